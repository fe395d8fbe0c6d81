"""Baked programs: standard programs of torch.export that do, in one mode, what eager PyTorch does."""

import copy
import io
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload

import compile_modes as cm
from compile_modes.exported.programs import baked
from compile_modes.graph.view import View

from nets import (  # isort: skip
    IMAGE, Activations, Attention, Auxiliary, ConvNet, DropBlock, DropPath, EveryFlag, MixedMask, Norms, Recurrent,
    Regions, Residual, Small, UnusedNorm, UserCounter,
)  # fmt: skip
from oracle import same_state, text  # isort: skip

VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


class State(nn.Module):
    """Everything that a signature can hold: tied weights, transient buffers, constants, buffers that are assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("transient", torch.randn(4), persistent=False)
        self.constant = torch.randn(4)
        self.bn = nn.BatchNorm1d(4, momentum=0.2)

    def forward(self, input, *, scale, more=()):
        x = self.tied(F.dropout(self.fc(input), 0.2, self.training)) * scale + self.frozen
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        x = self.bn(x) + self.transient + self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return {"x": x, "rest": [self.mean, *more], "none": None, "number": 3}


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.3))


def cumulative() -> nn.Module:
    norm = nn.BatchNorm2d(3, momentum=None, eps=1e-3)
    return nn.Sequential(norm, nn.Dropout(0.1), nn.BatchNorm2d(3, momentum=0.2))


def exported(model, x, start, **options):
    with cm.exportable(model):
        return torch.export.export(model.train(start), (x,), **options)


def reloaded(program):
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


def is_standard(program):
    """Whether there is nothing in a program that others don't know, and it passes torch's checks."""
    for body in View(program.graph_module).bodies:
        for node in body.graph.nodes:
            assert node.op in ("placeholder", "get_attr", "call_function", "output")
            if node.op == "call_function":
                assert (
                    isinstance(node.target, OpOverload | HigherOrderOperator) or node.target.__module__ == "_operator"
                )
                assert "compile_modes" not in str(node.target)
            if node.op in ("placeholder", "call_function"):
                assert "val" in node.meta, node
    program.validate()
    return True


def same(a, b, tolerance=0.0):
    leaves, structure = torch.utils._pytree.tree_flatten(a)
    others, other_structure = torch.utils._pytree.tree_flatten(b)
    assert structure == other_structure
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def does_as_eager(program, model, mode, *inputs, steps=3, tolerance=0.0, **kwargs):
    """Trains, or evaluates, a loaded program beside its model; both are left changed."""
    module = reloaded(program).module()
    model.train(mode)
    pairs = [[m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05)] for m in (model, module)]
    for step in range(steps):
        outputs = []
        for m, optimizer in pairs:
            torch.manual_seed(step)
            outputs.append(m(*inputs, **kwargs))
            if mode:
                leaves = [t for t in torch.utils._pytree.tree_leaves(outputs[-1]) if isinstance(t, torch.Tensor)]
                optimizer.zero_grad()
                sum(t.square().mean() for t in leaves).backward()
                optimizer.step()
        same(*outputs, tolerance)
        same_state(model, module, tolerance)


# fmt: off
CASES = {
    "conv": (ConvNet, IMAGE), "activations": (Activations, torch.randn(3, 4, 6)), "regions": (Regions, IMAGE),
    "norms": (Norms, torch.randn(3, 4, 5)), "recurrent": (Recurrent, torch.randn(2, 3, 4)),
    "unused-norm": (UnusedNorm, VECTORS), "user-counter": (UserCounter, VECTORS), "cumulative": (cumulative, IMAGE),
}
FROM_TRAIN = {
    "attention": (Attention, TOKENS), "drop-path": (lambda: Residual(DropPath(0.3), nn.Dropout(0.2)), IMAGE),
    "floor": (lambda: Residual(DropPath(0.4, "floor")), IMAGE), "drop-block": (lambda: Residual(DropBlock()), IMAGE),
    "spectral-norm": (spectral, VECTORS),
}
# fmt: on
DIRECTIONS = [
    (name, *case, start, mode) for name, case in CASES.items() for start in (True, False) for mode in (True, False)
]
DIRECTIONS += [(name, *case, True, mode) for name, case in FROM_TRAIN.items() for mode in (True, False)]


@pytest.mark.parametrize(
    ("build", "x", "start", "mode"),
    [d[1:] for d in DIRECTIONS],
    ids=["-".join(map(str, (d[0], *d[3:]))) for d in DIRECTIONS],
)
def test_a_program_in_a_mode_does_what_eager_does_in_it(build, x, start, mode):
    model = build()
    program = exported(model, x, start)
    before = text(program.module())
    result = baked(program, mode)
    assert text(program.module()) == before
    assert is_standard(result)
    assert result.state_dict.keys() == program.state_dict.keys()
    assert all(result.state_dict[name] is value for name, value in program.state_dict.items())
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    assert result.call_spec == program.call_spec
    core = result.run_decompositions()
    assert is_standard(core)
    does_as_eager(result, model, mode, x, tolerance=1e-6 if build is cumulative else 0.0)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_everything_that_a_signature_holds_is_kept(start, mode):
    model = State().train(start)
    kwargs = {"scale": torch.tensor(2.0), "more": (torch.randn(4), torch.randn(4))}
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"input": {0: batch}, "scale": None, "more": (None, None)}
    program = torch.export.export(model, (VECTORS,), kwargs, dynamic_shapes=shapes)
    result = baked(program, mode)
    assert is_standard(result)
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    kinds = [(spec.kind, type(spec.arg), spec.target) for spec in result.graph_signature.output_specs]
    assert kinds == [(spec.kind, type(spec.arg), spec.target) for spec in program.graph_signature.output_specs]
    assert result.constants.keys() == program.constants.keys()
    assert str(result.range_constraints) == str(program.range_constraints)
    same(program.example_inputs, result.example_inputs)
    loaded = reloaded(result)
    assert loaded.state_dict["fc.weight"].data_ptr() == loaded.state_dict["tied.weight"].data_ptr()
    assert not loaded.state_dict["frozen"].requires_grad
    with pytest.raises((RuntimeError, AssertionError)):
        loaded.module()(torch.randn(65, 4), **kwargs)
    with pytest.raises((RuntimeError, AssertionError)):
        loaded.module()(torch.randn(3, 5), **kwargs)
    does_as_eager(result, model, mode, torch.randn(9, 4), **kwargs)


class Symbols(nn.Module):
    """Sizes that depend on each other, one that is returned, and an input that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4, momentum=0.3)
        self.drop = nn.Dropout(0.2, inplace=True)

    def forward(self, x, y):
        torch._check(y.shape[0] == 2 * x.shape[0])
        z = self.bn(torch.cat([x, y]))
        return self.drop(z) * 2, z.shape[0]


@pytest.mark.parametrize("start", [True, False])
def test_dynamic_sizes_and_their_guards_are_kept_from_file_to_file(start):
    model = Symbols().train(start)
    batch = torch.export.Dim("batch", min=2, max=100)
    shapes = ({0: batch}, {0: 2 * batch})
    program = torch.export.export(model, (torch.randn(3, 4), torch.randn(6, 4)), dynamic_shapes=shapes)
    for mode in (not start, start, not start):
        program = reloaded(baked(program, mode))
        model.load_state_dict(program.state_dict)
        does_as_eager(program, model, mode, torch.randn(5, 4), torch.randn(10, 4))
        with pytest.raises((RuntimeError, AssertionError)):
            program.module()(torch.randn(5, 4), torch.randn(11, 4))


class Branches(nn.Module):
    """A branch of cond with a dropout, in whose body the owner is the root; and an input that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2)
        return torch.cond(x.sum() > 0, lambda x: F.dropout(self.fc(x), 0.3, self.training), torch.sin, (self.bn(x),))


@pytest.mark.parametrize("mode", [True, False])
def test_branches_and_inputs_that_are_written_to(mode):
    model = Branches()
    result = baked(exported(model, VECTORS.clone(), True), mode)
    assert is_standard(result)
    assert is_standard(result.run_decompositions())
    pairs = [(m, VECTORS.abs()) for m in (model.train(mode), reloaded(result).module())]
    outputs = []
    for m, x in pairs:
        torch.manual_seed(0)
        outputs.append((m(x), x))
    same(*outputs)
    same_state(model, pairs[1][0], 0.0)


def test_what_torch_adds_to_a_program_is_kept():
    """Guards that only the deserializer knows, and signatures of modules whose values are still there."""
    model = nn.Sequential(ConvNet(), nn.Linear(5, 2), DropPath(0.2))
    program = exported(model, IMAGE, True, preserve_module_call_signature=("0", "1", "2"))
    result = baked(reloaded(program), False)
    kept = {entry.fqn for entry in result.module_call_graph if entry.signature is not None}
    assert kept == {"", "0", "1"}  # the third does nothing in eval: its result is that of the second
    unflattened = torch.export.unflatten(result)
    assert torch.equal(unflattened(IMAGE), model.eval()(IMAGE))
    assert isinstance(unflattened.get_submodule("0"), nn.Module)


def fixed(model, mode, **modes):
    """A model whose modes stay as they are set here."""
    model = copy.deepcopy(model).train(mode)
    for name, module in model.named_modules():
        module.training = modes.get(name.rpartition(".")[2], module.training)
    model.train = lambda mode: model
    return model


def test_an_override_decides_over_the_mode_and_over_what_is_hard_coded():
    model = ConvNet()
    overrides = {"*.bn": "eval", "drop": "eval", "*drop": "train"}
    result = baked(exported(model, IMAGE, True), True, overrides)
    frozen = fixed(model, True, bn=False)
    frozen.drop.training = False
    does_as_eager(result, frozen, True, IMAGE)

    module = cm.export(EveryFlag(), (VECTORS,))
    assert [site.training for site in cm.sites(baked(module, False))] == [False, True, False, True, True]
    assert [site.training for site in cm.sites(baked(module, False, {"": "eval"}))] == [False] * 6
    assert [site.training for site in cm.sites(baked(module, True, {"": "train"}))] == [
        True
    ] * 6  # the mask is no call any more


def test_present_modes_and_weights_of_a_module_are_written():
    model = ConvNet()
    module = cm.export(model, (IMAGE,))
    reference = copy.deepcopy(model)
    for m in (module, reference):
        m.train()
        m.block1.eval()
        for parameter in m.parameters():
            parameter.data.add_(0.01)
    code = module.code
    does_now = baked(torch.compile(module))
    assert module.code == code
    frozen = copy.deepcopy(reference)
    frozen.train = lambda mode: frozen
    does_as_eager(does_now, frozen, True, IMAGE)
    same_state(reference, module, 0.0)
    module.half()
    with pytest.raises(cm.BindError) as error:
        baked(module)
    assert_expected_inline(
        str(error.value),
        """\
CM210: the program was exported with a torch.float32 of shape (4,) on cpu, the module has a torch.float16 of shape (4,) on cpu
  where: block1.bn.running_mean
  what to do: export again after changing dtypes, shapes or devices""",  # noqa: E501
    )


@pytest.mark.parametrize("mode", [True, False])
def test_of_two_programs_the_one_of_the_mode_is_written(mode):
    model = Auxiliary()
    module = cm.export(model, (IMAGE,))
    does_as_eager(baked(module, mode), copy.deepcopy(model), mode, IMAGE)
    result = baked(module, mode, {"*.bn": "eval" if mode else "train"})
    assert is_standard(result)
    does_as_eager(result, fixed(model, mode, bn=not mode), mode, IMAGE)
    for present in (True, False):
        assert text(baked(module.train(present)).module()) == text(baked(module, present).module())


@pytest.mark.parametrize("mode", [True, False])
def test_constants_of_two_programs_that_share_a_name(mode):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.2)

        def forward(self, x):
            return self.drop(self.bn(x)) + torch.tensor([1.0 + self.training])

    model = nn.Sequential(Constant())
    result = baked(cm.export(model, (VECTORS,)), mode, {"0.bn": "eval" if mode else "train"})
    does_as_eager(result, fixed(model, mode, bn=not mode), mode, VECTORS)


def test_a_decomposed_program_stays_one():
    model = ConvNet()
    for start in (True, False):
        core = exported(model, IMAGE, start).run_decompositions()
        for mode in (True, False) if start else (False,):
            result = baked(core, mode)
            assert result.dialect == core.dialect == "ATEN"
            assert is_standard(result)
            loaded = reloaded(result)
            if not mode:
                assert torch.equal(loaded.module()(IMAGE), copy.deepcopy(model).eval()(IMAGE))
    with pytest.raises(cm.BindError, match="dropouts that the model may have had are erased"):
        baked(core, True)


def test_a_custom_decomposition_is_taken_no_further():
    attention = torch.ops.aten.scaled_dot_product_attention.default
    table = torch.export.default_decompositions()
    table.pop(attention)
    core = exported(Attention(0.0), TOKENS, True).run_decompositions(table)
    result = baked(core, False)
    assert result.graph.find_nodes(op="call_function", target=attention)
    assert not result.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)


def test_the_counter_that_a_strict_eval_export_drops_comes_back():
    program = exported(Small(4), VECTORS, False, strict=True)
    assert "bn.num_batches_tracked" not in program.graph_signature.buffers
    result = baked(program, True)
    assert "bn.num_batches_tracked" in result.graph_signature.buffers
    assert is_standard(result)
    model = Small(4)
    model.load_state_dict(program.state_dict)
    does_as_eager(result, model, True, VECTORS)


def test_the_layout_that_attention_has_without_dropout_is_what_the_program_says():
    program = exported(Attention(), TOKENS, True)
    result = baked(program, False)
    values = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(result.graph_module).run(*result.state_dict.values(), TOKENS)
    (attention,) = [n for n in values if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert attention.meta["val"].stride() == values[attention].stride()


def test_the_result_can_be_bound_again():
    program = baked(exported(Regions(), IMAGE, True), False)
    before = text(program.module())
    bound = cm.bind(program)
    assert not bound.training
    bound.train()
    assert text(program.module()) == before
    model = Regions()
    model.load_state_dict(bound.state_dict())
    again = baked(cm.bind(reloaded(program)), True)
    does_as_eager(again, model, True, IMAGE)


SCRIPT = """
import sys, torch
program, expected = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
torch.manual_seed(0)
assert torch.equal(program.module()(expected["x"]), expected["y"])
program.run_decompositions()
assert "compile_modes" not in sys.modules
"""


@pytest.mark.parametrize("mode", [True, False])
def test_loads_in_a_process_that_does_not_know_this_package(mode, tmp_path):
    model = nn.Sequential(cumulative(), Residual(DropPath(0.2)))
    torch.export.save(baked(exported(model, IMAGE, True), mode), tmp_path / "model.pt2")
    torch.manual_seed(0)
    torch.save({"x": IMAGE, "y": model.train(mode)(IMAGE)}, tmp_path / "expected.pt")
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", SCRIPT, *files], check=True, timeout=300, cwd=tmp_path)


@pytest.mark.slow
def test_aotinductor_compiles_it(tmp_path):
    model = nn.Sequential(ConvNet(), nn.Linear(5, 2))
    batch = torch.export.Dim("batch", min=2, max=16)
    program = baked(exported(model, IMAGE, True, dynamic_shapes=({0: batch},)), False)
    path = torch._inductor.aoti_compile_and_package(reloaded(program), package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(11, 3, 8, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model.eval()(x))


REFUSALS = {
    "stuck": (lambda: exported(Attention(), TOKENS, False), True, None),
    "override": (lambda: exported(Attention(), TOKENS, False), None, {"": "train"}),
    "unclear": (lambda: exported(MixedMask(), VECTORS, True), False, None),
    "no-match": (lambda: exported(ConvNet(), IMAGE, True), None, {"block1.bm": "eval"}),
    "no-program": (lambda: cm.bind(exported(ConvNet(), IMAGE, True).module()), True, None),
    "edited": (lambda: cm.bake(cm.bind(exported(ConvNet(), IMAGE, True))), True, None),
}


def test_error_texts():
    said = []
    for name, (build, mode, overrides) in REFUSALS.items():
        with pytest.raises(cm.CompileModesError) as error:
            baked(build(), mode, overrides)
        short = re.sub("dropout_p is 0.*", "dropout_p is 0 ...", str(error.value))
        said.append(f"{name}: {type(error.value).__name__}: {short}")
    assert_expected_inline(
        "\n".join(said),
        """\
stuck: BindError: CM211: something can't be put into the mode that was asked for, or may not be right there:
CM230: 1 sites keep their exported mode and will not follow train() and eval():
  scaled_dot_product_attention (owner ''): CM713: dropout_p is 0 ...
  what to do: export in train mode, which keeps what they need
  what to do: as said there, or pass allow_stuck=True to leave it as it is
override: OverrideError: CM136: overrides name sites that can't be put into that mode:
  scaled_dot_product_attention (aten.scaled_dot_product_attention.default, owner '', eval): CM713: dropout_p is 0 ...
  what to do: leave these sites out, or pass allow_stuck=True to leave them as they are
unclear: BindError: CM211: something can't be put into the mode that was asked for, or may not be right there:
CM235: random numbers of '' are drawn in both modes: one export can't tell whether they depend on mode.
  what to do: compile_modes.export(model, args), which can; or keep=[owner] if they don't
  what to do: as said there, or pass allow_stuck=True to leave it as it is
no-match: OverrideError: CM109: the pattern 'block1.bm' matches no mode-dependent site
  where: overrides['block1.bm']
  what to do: owners here: 'block1.bn', 'block2.bn', 'block1.drop'
no-program: BindError: CM208: GraphModule was not made from an ExportedProgram by bind(), nor by export()
  what to do: pass the ExportedProgram itself, or bind() it and pass the result
edited: BindError: CM209: the module's graph was edited after it was bound
  what to do: pass a module that bind() returned""",
    )


def test_what_is_stuck_is_written_on_request():
    program = exported(Attention(), TOKENS, False)
    with pytest.warns(cm.ModeWarning, match="its p is lost"):
        result = baked(program, True, allow_stuck=True)
    assert [site.training for site in cm.sites(result)] == [False, True]
    assert baked(program, False) is program  # in that mode already, and that it can't leave it is no matter
