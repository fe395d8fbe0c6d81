"""Baked programs: standard programs of torch.export that do, in one mode, what eager PyTorch does."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes.exported.programs import baked
from exported.standard import does_as_eager, exported, is_standard, reloaded
from nets import (
    IMAGE,
    TOKENS,
    VECTORS,
    Attention,
    ConvNet,
    DropBlock,
    DropPath,
    Regions,
    Residual,
    Small,
    UserCounter,
)  # fmt: skip
from oracle import same, same_state, seeded, text
from setups import NETS


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


# fmt: off
CASES = {
    **{name: net for name, net in NETS.items() if name != "attention"}, "cumulative": (cumulative, IMAGE),
}
FROM_TRAIN = {
    "attention": NETS["attention"], "drop-path": (lambda: Residual(DropPath(0.3), nn.Dropout(0.2)), IMAGE),
    "floor": (lambda: Residual(DropPath(0.4, "floor")), IMAGE), "drop-block": (lambda: Residual(DropBlock()), IMAGE),
    "spectral-norm": (spectral, VECTORS),
}
# fmt: on
DIRECTIONS = [
    (name, *case, start, mode) for name, case in CASES.items() for start in (True, False) for mode in (True, False)
]
DIRECTIONS += [(name, *case, True, mode) for name, case in FROM_TRAIN.items() for mode in (True, False)]


EVERY_DIRECTION = pytest.mark.parametrize(
    ("build", "x", "start", "mode"),
    [d[1:] for d in DIRECTIONS],
    ids=["-".join(map(str, (d[0], *d[3:]))) for d in DIRECTIONS],
)


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
@EVERY_DIRECTION
@pytest.mark.every(6)
def test_a_program_in_a_mode_does_what_eager_does_in_it(build, x, start, mode):
    model = build()
    program = exported(model, x, start)
    before = text(program.module())
    result = baked(program, mode, allow_stuck=build is UserCounter)
    assert text(program.module()) == before
    assert is_standard(result)
    assert result.state_dict.keys() == program.state_dict.keys()
    assert all(result.state_dict[name] is value for name, value in program.state_dict.items())
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    assert result.call_spec == program.call_spec
    does_as_eager(result, model, mode, x, tolerance=1e-6 if build is cumulative else 0.0)


@pytest.mark.filterwarnings("ignore:CM240")
@pytest.mark.slow
@EVERY_DIRECTION
def test_a_program_in_a_mode_decomposes(build, x, start, mode):
    program = exported(build(), x, start)
    assert is_standard(baked(program, mode, allow_stuck=build is UserCounter).run_decompositions())


@pytest.mark.filterwarnings("ignore:CM240")  # of buffers that are meant to be written in both modes
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_everything_that_a_signature_holds_is_kept(start, mode):
    model = State().train(start)
    kwargs = {"scale": torch.tensor(2.0), "more": (torch.randn(4), torch.randn(4))}
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"input": {0: batch}, "scale": None, "more": (None, None)}
    program = torch.export.export(model, (VECTORS,), kwargs, dynamic_shapes=shapes)
    result = baked(program, mode, allow_stuck=True)
    assert is_standard(result)
    assert result.graph_signature.input_specs == program.graph_signature.input_specs
    kinds = [(spec.kind, type(spec.arg), spec.target) for spec in result.graph_signature.output_specs]
    assert kinds == [(spec.kind, type(spec.arg), spec.target) for spec in program.graph_signature.output_specs]
    assert result.constants.keys() == program.constants.keys()
    assert str(result.range_constraints) == str(program.range_constraints)
    same("example inputs", program.example_inputs, result.example_inputs, 0.0)
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


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", [True, False])
def test_branches_and_inputs_that_are_written_to(mode):
    model = Branches()
    result = baked(exported(model, VECTORS.clone(), True), mode)
    assert is_standard(result)
    assert is_standard(result.run_decompositions())
    loaded = reloaded(result).module()
    given = [VECTORS.abs(), VECTORS.abs()]
    outputs = [seeded(m, x) for m, x in zip((model.train(mode), loaded), given, strict=True)]
    same("output", *outputs, 0.0)
    same("input", *given, 0.0)
    same_state(model, loaded, 0.0)


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
for program, expected in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    program, expected = torch.export.load(program), torch.load(expected)
    torch.manual_seed(0)
    assert torch.equal(program.module()(expected["x"]), expected["y"])
    program.run_decompositions()
assert "compile_modes" not in sys.modules
"""


@pytest.mark.slow
def test_loads_in_a_process_that_does_not_know_this_package(tmp_path):
    model = nn.Sequential(cumulative(), Residual(DropPath(0.2)))
    files = []
    for mode in (True, False):
        torch.export.save(baked(exported(model, IMAGE, True), mode), tmp_path / f"{mode}.pt2")
        expected = seeded(model.train(mode), IMAGE)
        torch.save({"x": IMAGE, "y": expected}, tmp_path / f"{mode}.pt")
        files += [str(tmp_path / f"{mode}.pt2"), str(tmp_path / f"{mode}.pt")]
    subprocess.run([sys.executable, "-c", SCRIPT, *files], check=True, timeout=300, cwd=tmp_path)


@pytest.mark.slow
def test_aotinductor_compiles_it(tmp_path):
    model = nn.Sequential(ConvNet(), nn.Linear(5, 2))
    batch = torch.export.Dim("batch", min=2, max=16)
    program = baked(exported(model, IMAGE, True, dynamic_shapes=({0: batch},)), False)
    path = torch._inductor.aoti_compile_and_package(reloaded(program), package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(11, 3, 8, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model.eval()(x))
