import copy
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import compile_modes as cm
from compile_modes import _compat
from compile_modes.backend.entry import Options
from graphs import graphs_compiled
from nets import IMAGE, Attention, BrokenBetween, ConvNet, HardCoded, Parent
from oracle import agrees, same_outputs, same_steps
from setups import STARTS, compile_, nets


@pytest.mark.usefixtures("no_inductor")
class TestWithoutInductor:
    @pytest.mark.parametrize(("build", "x"), nets("conv", "activations", "norms", "regions", "attention", "unused"))
    @pytest.mark.every(2)
    def test_eager_models(self, build, x):
        reference = build()
        module = copy.deepcopy(reference)
        agrees(reference, module, compile_(module), [x])
        assert graphs_compiled() == 2

    @STARTS
    @pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
    @pytest.mark.every(3)
    def test_bound_models(self, start, nested):
        child = ConvNet()
        reference = Parent(child) if nested else child
        module = copy.deepcopy(reference)
        bound = cm.bind(torch.export.export(copy.deepcopy(child).train(start), (IMAGE,)))
        if nested:
            module.child = bound
        else:
            module = bound
        agrees(reference, module, compile_(module), [IMAGE])
        assert graphs_compiled() == 2

    def test_submodule_modes_compile_once_each(self):
        reference = ConvNet()
        bound = cm.bind(torch.export.export(copy.deepcopy(reference), (IMAGE,)))
        compiled = compile_(bound)
        for touch in (lambda m: m.block1.bn.eval(), lambda m: m.drop.train(), lambda m: m.block1.bn.eval()):
            agrees(reference, bound, compiled, [IMAGE], flips=1, touch=touch)
        assert graphs_compiled() == 4  # train with frozen bn, eval, train, eval with live dropout

    def test_twenty_flips_two_graphs_and_the_copy_flips_on_its_own(self):
        reference = ConvNet()
        bound = cm.bind(torch.export.export(copy.deepcopy(reference), (IMAGE,)))
        compiled = compile_(bound)
        for flip in range(20):
            bound.train(flip % 2 == 0)
            compiled(IMAGE)
        assert graphs_compiled() == 2
        copied = copy.deepcopy(bound).train()
        bound.eval()
        recompiled = compile_(copied)
        expected = copy.deepcopy(reference)
        expected.load_state_dict(bound.state_dict())
        agrees(expected, copied, recompiled, [IMAGE], flips=1)
        assert not bound.training
        torch.testing.assert_close(compiled(IMAGE), bound(IMAGE))

    @pytest.mark.parametrize("kind", ["eager", "bound"])
    @pytest.mark.parametrize("flags", [True, False], ids=["flags-train", "flags-eval"])
    @pytest.mark.parametrize(
        ("options", "equivalent"),
        [
            ({"training": True}, lambda m: m.train()),
            ({"training": False}, lambda m: m.eval()),
            ({"overrides": {"*bn": "eval"}}, lambda m: [m.block1.bn.eval(), m.block2.bn.eval()]),
            ({"overrides": {"*bn": "train"}}, lambda m: [m.block1.bn.train(), m.block2.bn.train()]),
            ({"overrides": {"*drop": "train"}}, lambda m: [b.drop.train() for b in (m, m.block1, m.block2)]),
            ({"training": False, "overrides": {"block1.*": "train"}}, lambda m: [m.eval(), m.block1.train()]),
        ],
        ids=["train", "eval", "bn-eval", "bn-train", "mc-dropout", "mixed"],
    )
    @pytest.mark.every(3)
    def test_explicit_modes(self, kind, flags, options, equivalent):
        reference = ConvNet()
        module = copy.deepcopy(reference)
        if kind == "bound":
            module = cm.bind(torch.export.export(module, (IMAGE,)))
        reference.train(flags)
        module.train(flags)
        equivalent(reference)
        same_steps(reference, module, compile_(module, **options), [IMAGE], train=False, tolerance=1e-5)

    @pytest.mark.parametrize("kind", ["dropout", "alpha_dropout", "feature_alpha_dropout"])
    def test_the_input_of_a_dropout_that_is_woken_stays_what_it_is(self, kind):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                y = self.fc(x)
                dropped = getattr(torch.nn.functional, kind)(y, 0.4, self.training)
                return dropped * 2 + y  # in eval, both are one tensor

        model, x = Residual().eval(), torch.randn(5, 4)
        compiled = compile_(model, training=True)
        same_outputs(copy.deepcopy(model).train(), compiled, x, tolerance=1e-5)

    def test_a_forced_counter_belongs_to_its_own_instance(self):
        models = [ConvNet().eval() for _ in range(2)]
        first, second = (compile_(m, training=True) for m in models)
        for call in (first, first, second, first):
            call(IMAGE)
        assert [int(m.block1.bn.num_batches_tracked) for m in models] == [3, 1]

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"overrides": {"block1.bm": "eval"}}, cm.OverrideError, "'block1.bn'"),
            ({"overrides": {"block1.bn": "off"}}, cm.OptionError, "'off' is not a mode"),
            ({"training": "eval"}, cm.OptionError, "training is 'eval'"),
            ({"overides": {}}, cm.OptionError, "did you mean 'overrides'"),
            ({"max_autotun": True}, cm.OptionError, "did you mean 'max_autotune"),
        ],
    )
    def test_bad_options(self, options, error, says):
        model = ConvNet()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=says):
            compile_(model, **options)(IMAGE)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_bad_modes(self):
        with pytest.raises(cm.OptionError, match="did you mean 'max-autotune'"):
            torch.compile(ConvNet(), backend="pt2e_modes", mode="max-autotun")(IMAGE)

    def test_an_override_that_cannot_be_honoured_is_an_error(self):
        x = torch.randn(2, 5, 8)
        model = Attention().eval()
        with pytest.raises(cm.OverrideError, match="its p is lost"):
            compile_(model, training=True)(x)
        compile_(model, overrides={"drop": "train"})(x)

    def test_patterns_may_be_meant_for_another_part_of_a_broken_graph(self):
        model = BrokenBetween()
        compiled = compile_(model, overrides={"first": "eval", "second": "eval"})
        assert torch.equal(compiled(torch.ones(50)), torch.ones(50))

    def test_an_unbound_exported_module_is_warned_about_once(self):
        gm = torch.export.export(ConvNet(), (IMAGE,)).module()
        with pytest.warns(cm.ModeWarning, match=r"compile_modes\.bind"):
            compile_(Parent(gm))(IMAGE)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", cm.ModeWarning)
            compile_(Parent(gm))(IMAGE)
            compile_(cm.bind(torch.export.export(ConvNet(), (IMAGE,))))(IMAGE)
            compile_(cm.bind(torch.export.export(HardCoded().eval(), (torch.randn(3, 4),))))(torch.randn(3, 4))

    @pytest.mark.slow
    def test_dynamic_shapes_and_no_grad(self):
        reference = ConvNet()
        module = copy.deepcopy(reference)
        compiled = torch.compile(module, backend="pt2e_modes", dynamic=True)
        for size in (3, 5, 6):
            agrees(reference, module, compiled, [IMAGE[:size]], flips=1, steps=2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(IMAGE), reference(IMAGE))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(IMAGE), reference(IMAGE))


def test_the_captured_graph_is_what_inductor_gets(monkeypatch):
    seen = []

    def inductor(mode, options):
        def compile_fx(gm, example_inputs):
            seen.append((mode, options, [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]))
            return gm.forward

        return compile_fx

    monkeypatch.setattr(_compat, "inductor", inductor)
    compile_(ConvNet().eval(), training=False, max_autotune=False)(IMAGE)
    ((mode, options, targets),) = seen
    assert mode is None
    assert options == {"max_autotune": False}
    assert "aten.batch_norm.default" in targets
    assert "aten.dropout.default" in targets


def test_options_are_split():
    options = Options.parse(None, {"training": False, "epilogue_fusion": True, "triton.cudagraphs": False})
    assert options == Options(False, {}, {}, {"epilogue_fusion": True, "triton.cudagraphs": False})
    assert options.explicit
    assert not Options.parse("reduce-overhead", None).explicit


def test_the_backend_is_found_without_an_import():
    assert "pt2e_modes" in torch._dynamo.list_backends(exclude_tags=())
