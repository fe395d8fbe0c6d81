"""The one-shot helpers leave literals where tools downstream read them; the checks of torchao's own tests, and more."""

import copy

import pytest
import torch
from torch import fx, nn

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled
from nets import IMAGE, Attention, Auxiliary, ConvNet, HardCoded, Parent, Regions
from oracle import literals, same_state, text

MOVE = {True: cm.move_exported_model_to_train, False: cm.move_exported_model_to_eval}
VECTORS = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))


class NormAndDrop(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(3, eps=1e-3, momentum=0.03), nn.Dropout(0.3, inplace=inplace)

    def forward(self, x):
        return self.drop(self.bn(x))


def exported(model, x=IMAGE, **options):
    return torch.export.export(copy.deepcopy(model), (x,), **options).module()


def argument(module, op, index):
    (node,) = module.graph.find_nodes(op="call_function", target=op)
    return node.args[index]


def modes(module, inplace=False):
    drop = torch.ops.aten.dropout_.default if inplace else torch.ops.aten.dropout.default
    return argument(module, torch.ops.aten.batch_norm.default, 5), argument(module, drop, 2)


def calls(reference, module, x, seeds=2):
    for seed in range(seeds):
        torch.manual_seed(seed)
        expected = reference(x)
        torch.manual_seed(seed)
        assert torch.equal(module(x), expected)


def raises_in_train_and_eval(module):
    for method in (module.train, module.eval):
        with pytest.raises(NotImplementedError):
            method()


def test_exported_models_are_told_from_traced_and_eager_ones():
    model = NormAndDrop()
    assert cm.model_is_exported(exported(model, strict=True))
    assert not cm.model_is_exported(fx.symbolic_trace(model))
    assert not cm.model_is_exported(model)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_modes_of_dropout_and_batch_norm_are_literals(inplace, strict):
    reference = NormAndDrop(inplace)
    module = exported(reference, strict=strict)
    before = literals(module)
    raises_in_train_and_eval(module)
    assert modes(module, inplace) == (True, True)
    for mode in (False, True, False, True):
        assert MOVE[mode](module) is module
        assert modes(module, inplace) == (mode, mode)
        assert literals(module) == before, "p, eps and momentum are kept"
        raises_in_train_and_eval(module)
        calls(reference.train(mode), module, IMAGE)
        same_state(reference, module, 0.0)  # num_batches_tracked too


def test_allowed_models_flip_by_train_and_eval_and_generate_no_code():
    reference = NormAndDrop()
    module = exported(reference)
    raises_in_train_and_eval(module)
    assert cm.allow_exported_model_train_eval(module) is module
    assert module.training
    code = module.code
    for mode in (True, True, False, False, True):
        assert module.train(mode) is module
        assert {site.training for site in cm.sites(module)} == {mode}
        assert all(isinstance(flag, fx.Node) for flag in modes(module))
        calls(reference.train(mode), module, IMAGE, seeds=1)
    assert module.code == code
    assert cm.allow_exported_model_train_eval(module) is module
    assert module.code == code
    assert modes(cm.bake(module.eval())) == (False, False)


@pytest.mark.parametrize("mode", [True, False])
def test_a_repeated_call_writes_nothing(mode, monkeypatch):
    module = MOVE[mode](exported(ConvNet()))
    kind, graphs = type(module), text(module)
    monkeypatch.setattr(kind, "recompile", lambda self: pytest.fail("nothing has changed"))
    assert MOVE[mode](module) is module
    assert type(module) is kind
    assert text(module) == graphs


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(("build", "x"), [(ConvNet, IMAGE), (Regions, IMAGE)])
def test_moves_equal_eager_and_programs_stay_as_they_are(build, x, start):
    reference = build()
    program = torch.export.export(copy.deepcopy(reference).train(start), (x,))
    module, graph = program.module(), text(program.module())
    for mode in (not start, start, not start):
        calls(reference.train(mode), MOVE[mode](module), x)
        same_state(reference, module, 0.0)
    assert text(program.module()) == graph, "bodies of regions are the module's own"


def test_hard_coded_modes_and_kept_sites_stay():
    reference = HardCoded().eval()
    module = exported(reference, VECTORS)
    for mode in (True, False, True, False):
        calls(reference.train(mode), MOVE[mode](module), VECTORS)
    assert [site.training for site in cm.sites(module)] == [False, False, True]


def test_a_bound_module_keeps_its_flags():
    for module in (cm.bind(exported(ConvNet())), cm.export(Auxiliary(), (IMAGE,))):
        for mode in (False, True):
            assert MOVE[mode](module) is module
            assert all(m.training is mode for m in module.modules() if not isinstance(m, fx.GraphModule) or m is module)
            assert all(site.bound for site in cm.sites(module))
        compiled = torch.compile(module, backend="eager")
        assert cm.move_exported_model_to_eval(compiled) is compiled
        assert not module.training
    nothing = cm.bind(exported(nn.Linear(4, 4), VECTORS))
    assert not cm.move_exported_model_to_eval(nothing).training


def test_a_flip_is_seen_in_a_compiled_module_and_in_a_compiled_parent():
    for wrap in (lambda m: m, Parent):
        child = exported(ConvNet())
        reference = copy.deepcopy(wrap(ConvNet()))
        (reference.child if wrap is Parent else reference).load_state_dict(child.state_dict())
        module = wrap(child)
        compiled = torch.compile(module, backend="eager")
        before = graphs_compiled()
        for mode in (True, False, True):
            (reference.child if wrap is Parent else reference).train(mode)
            assert MOVE[mode](child) is child
            calls(reference, compiled, IMAGE, seeds=1)
        assert graphs_compiled() > before


def test_what_can_not_be_moved_is_said():
    module = exported(Attention().eval(), torch.randn(2, 5, 8))
    with pytest.warns(cm.ModeWarning, match=r"1 sites can't be put into train mode(.|\n)*its p is lost") as caught:
        assert cm.move_exported_model_to_train(module) is module
    assert caught[0].filename == __file__
    assert [site.training for site in cm.sites(module)] == [False, True]
    with pytest.raises(cm.BindError, match="can't be edited in place"):
        cm.move_exported_model_to_eval(torch.export.export(ConvNet(), (IMAGE,)))


def test_after_a_move_a_module_can_be_bound_and_after_bake_moved():
    reference = ConvNet()
    module = cm.move_exported_model_to_eval(exported(reference))
    assert not cm.bind(module).training
    calls(reference.train(), module.train(), IMAGE)
    cm.move_exported_model_to_eval(cm.bake(module))
    assert not any(site.bound or site.training for site in cm.sites(module))
    with pytest.raises(cm.BindError, match="baked"):
        module.train()


@pytest.mark.slow
def test_prepared_and_converted_models():
    quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = quantize.prepare_qat_pt2e(exported(ConvNet()), quantizer)
    raises_in_train_and_eval(prepared)
    prepared(IMAGE)
    before = literals(prepared)
    cm.move_exported_model_to_train(cm.move_exported_model_to_eval(prepared))
    assert literals(prepared) == before
    converted = quantize.convert_pt2e(prepared)
    raises_in_train_and_eval(converted)
    assert not [site for site in cm.sites(cm.move_exported_model_to_eval(converted)) if site.training]
    cm.allow_exported_model_train_eval(converted).train()
    assert [site for site in cm.sites(converted) if site.training]
