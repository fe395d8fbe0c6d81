"""Graphs inside graphs: checkpoints, branches, loops, nested compile regions, grad modes, autocast and kernels."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import compile_modes as cm
from backend.nested import CHECKPOINTS, Net, X, no_grad, selective
from compile_modes import _compat
from graphs import graphs_compiled
from oracle import agrees, same_outputs, same_step, same_steps
from setups import compile_

pytestmark = pytest.mark.usefixtures("no_inductor")


def _autocast(net, x):
    y = net.fc(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.body(y)
        w = z.float()  # of what is bfloat16 only if autocast is applied while tracing
    return w + y + z


def _inference(net, x):
    y = net.fc(x)
    with torch.inference_mode():
        z = net.drop(y * 2)
    return y + z.clone()


def _kernel(net, x):
    q = net.body(x)[None]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2 if net.training else 0.0)[0]


# Bodies that may not write, as batch norm would in train: eval statistics or none.
BRANCHES = {
    "cond": lambda net, x: torch.cond(
        x.sum() > 0, lambda y: net.drop(y.sin()), lambda y: net.drop(y) + 1, (net.fc(x),)
    ),
    "region": lambda net, x: net.region(net.out(x)) + net.region(x),
}
REGIONS = {"inference": _inference, "no_grad": no_grad, "sdpa_kernel": _kernel}
ALL = {**CHECKPOINTS, **BRANCHES, **REGIONS}
NORM, DROPOUT, EVERYTHING = ("bn", "last"), ("drop",), None
# More ways to write the body of a checkpoint: the default run puts everything at once into the other mode there.
MORE = ("reentrant", "selective", "nested")
PARTS = [
    pytest.param(kind, parts, marks=[pytest.mark.slow] if parts and kind in MORE else [], id=f"{kind}-{name}")
    for kind in ALL
    for name, parts in (("norm", NORM), ("dropout", DROPOUT), ("all", EVERYTHING))
    if parts is not NORM or kind not in (*BRANCHES, "inference")  # which have no batch norm
]


def make(kind):
    if kind == "inference" and torch.__version__ < "2.12":
        pytest.skip("stock torch 2.11 crashes on it")
    return Net(ALL[kind], norm=kind not in BRANCHES)


# cond: torch draws its masks anew in the backward pass, eager as well.
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in MORE else []) for k in ALL if k != "cond"]
)
@pytest.mark.every(4)
def test_flips_and_steps(kind):
    reference = make(kind)
    module = copy.deepcopy(reference)
    # Eager computes a checkpoint's statistics twice, stock torch.compile once.
    oracle = torch.compile(reference, backend="aot_eager") if kind in CHECKPOINTS else reference
    agrees(reference, module, compile_(module), [X], oracle=oracle, flips=2, steps=2)
    assert graphs_compiled() == (4 if kind in CHECKPOINTS else 2), "captured whole, in both modes"


def test_a_checkpoint_whose_body_writes_nothing_equals_eager():
    reference = Net(CHECKPOINTS["checkpoint"], norm=False)
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X])
    assert graphs_compiled() == 2


@pytest.mark.parametrize("flags", [True, False], ids=["flags-train", "flags-eval"])
@pytest.mark.parametrize(("kind", "parts"), PARTS)
@pytest.mark.every(5)
def test_modes_reach_into_bodies(kind, flags, parts):
    reference = make(kind).train(flags)
    module = copy.deepcopy(reference)
    if parts is None:
        if kind == "sdpa_kernel" and not flags:
            pytest.skip("attention in eval has no probability")
        options = {"training": not flags}
        reference.train(not flags)
    else:
        options = {"overrides": dict.fromkeys(parts, "eval" if flags else "train")}
        for part in parts:
            reference.get_submodule(part).train(not flags)
    oracle = torch.compile(reference, backend="aot_eager") if kind in CHECKPOINTS else reference
    same_steps(reference, module, compile_(module, **options), [X], oracle=oracle, steps=2, tolerance=1e-5)


def test_autocast_is_applied_while_tracing():
    """Equal to stock to the last bit; eager rounds in other places of the backward pass."""
    reference = Net(_autocast)
    module = copy.deepcopy(reference)
    oracle, compiled = torch.compile(reference, backend="aot_eager"), compile_(module)
    for mode in (True, False, True):
        reference.train(mode), module.train(mode)
        same_steps(reference, module, compiled, [X], oracle=oracle, steps=2, tolerance=0.0)
    same_step(copy.deepcopy(module), module, compiled, [X], tolerance=1e-5)
    assert graphs_compiled() == 4
    for training in (True, False):
        torch._dynamo.reset()
        forced = copy.deepcopy(module).train(not training)
        same_step(
            copy.deepcopy(module).train(training), forced, compile_(forced, training=training), [X], tolerance=1e-5
        )
        assert not torch.is_autocast_enabled("cpu")


def _graphs(model: nn.Module, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ops of the forward and the backward graph that the partitioner makes, and what the forward saves."""
    found: list[list[str]] = []

    def keep(gm, example_inputs):
        ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
        # The two spellings of torch and of the tracer for what autograd never sees.
        found.append(
            [op for op in ops if "getitem" not in op and op not in ("aten.alias.default", "aten.detach.default")]
        )
        found.append([str(len(gm.graph.output_node().args[0]))])
        return make_boxed_func(gm.forward)

    autograd = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(_compat, "inductor", lambda mode, options: autograd)
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.compile(model, backend=backend or autograd)(X).square().sum().backward()
    return found


@pytest.mark.parametrize("kind", ["checkpoint", "selective", "nested"])
@pytest.mark.every(2)
def test_checkpoints_still_recompute(kind, monkeypatch):
    def tower(net, y):
        return net.out((net.fc(y.sin()).sigmoid() @ net.fc.weight).exp().sin())

    def run(net, x):
        if kind == "nested":
            return checkpoint(
                lambda y: checkpoint(functools.partial(tower, net), y, use_reentrant=False) * 2, x, use_reentrant=False
            )
        options = {"context_fn": selective} if kind == "selective" else {}
        return checkpoint(functools.partial(tower, net), x, use_reentrant=False, **options)

    ours = _graphs(Net(run), "pt2e_modes", monkeypatch)
    assert ours == _graphs(Net(run), None, monkeypatch)
    assert ours != _graphs(Net(tower), "pt2e_modes", monkeypatch), "nothing was checkpointed"


class Shared(nn.Module):
    """A region that Dynamo traces once for several modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout(0.4)

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Shared() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_calls_of_one_region_have_modes_of_their_own():
    reference = Stack()
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X], flips=1, steps=2)
    for chosen in (1, 2, 3):
        torch._dynamo.reset()
        expected, forced = copy.deepcopy(reference).eval(), copy.deepcopy(reference).eval()
        expected.layers[chosen].drop.train()
        compiled = compile_(forced, overrides={f"layers.{chosen}.drop": "train"})
        same_steps(expected, forced, compiled, [X], steps=1, tolerance=1e-5)
    torch._dynamo.reset()
    with pytest.raises(cm.OverrideError, match=r"layers\.3\.drop"):
        compile_(reference, overrides={"layers.4.drop": "eval"})(X)


@pytest.mark.parametrize("kind", ["while_loop", "scan", "map"])
@pytest.mark.every(2)
def test_loops(kind):
    from torch._higher_order_ops import map as mapped
    from torch._higher_order_ops import scan, while_loop

    runs = {
        "while_loop": lambda net, x: while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, net.drop(y.sin())), (torch.tensor(0), x)
        )[1],
        "scan": lambda net, x: scan(lambda c, v: (c + net.drop(v), c * 2), torch.zeros(4), x)[1],
        "map": lambda net, x: mapped(lambda v: net.drop(v.sin()), x),
    }
    for flags in (True, False):
        torch._dynamo.reset()
        module = Net(runs[kind]).train(flags)
        module.out = nn.Identity()
        expected = copy.deepcopy(module).train(not flags)
        with torch.no_grad():
            oracle = torch.compile(expected, backend="aot_eager")
            same_outputs(oracle, compile_(module, training=not flags), X, seeds=1, tolerance=1e-5)


@pytest.mark.slow
def test_flex_attention():
    def run(net, x):
        q = net.body(x)[None, None]
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + i - j)[0, 0]

    for flags in (True, False):
        torch._dynamo.reset()
        module = Net(run).train(flags).requires_grad_(False)
        expected = copy.deepcopy(module)
        expected.last.train(not flags)
        expected.drop.train(not flags)
        other = "eval" if flags else "train"
        compiled = compile_(module, overrides={"last": other, "drop": other})
        same_outputs(expected, compiled, torch.cat([X] * 4, -1)[:, :4], seeds=1, tolerance=1e-5)


class Exported(nn.Module):
    """Regions that export makes graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn, self.frozen = nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4, momentum=0.2)
        self.drop, self.last = nn.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.drop(self.bn(self.out(y)))
        with torch.no_grad():
            z = self.last(self.frozen(x))
        return y.float() + z


@pytest.mark.slow
@pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
@pytest.mark.every(2)
def test_regions_of_bound_programs(start):
    reference = Exported().train(start)
    bound = cm.bind(torch.export.export(copy.deepcopy(reference), (X,)))
    agrees(reference, bound, compile_(bound), [X], flips=2, steps=2, tolerance=2e-2)  # eager rounds elsewhere
    for flags in (True, False):
        torch._dynamo.reset()
        module, expected = copy.deepcopy(bound).train(flags), copy.deepcopy(bound).train(flags)
        for name in ("bn", "last"):
            expected.get_submodule(name).train(not flags)
        other = "eval" if flags else "train"
        stock = torch.compile(expected, backend="aot_eager")
        compiled = compile_(module, overrides={"bn": other, "last": other})
        same_steps(expected, module, compiled, [X], oracle=stock, steps=1, tolerance=0.0)


class Undifferentiated(nn.Module):
    """A dropout in a block without gradients, whose input is used again: in eval, what it returns has the gradient."""

    def __init__(self):
        super().__init__()
        self.linear, self.inside, self.outside = nn.Linear(8, 8), nn.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x):
        with torch.no_grad():
            y = self.inside(x)
        return self.outside(self.linear(x)) * y


@pytest.mark.filterwarnings("ignore:CM419")
@pytest.mark.parametrize(
    "options",
    [{"tune": True}, {"modes": "data"}, {"overrides": {"inside": "eval"}}, {"overrides": {"inside": "train"}}],
    ids=["flags", "data", "eval", "train"],
)
def test_gradients_through_an_eval_dropout_in_a_block_without(options):
    torch.manual_seed(0)
    model = Undifferentiated()
    call, x = torch.compile(model, backend="pt2e_modes", options=options), torch.randn(4, 8)
    for mode in (True, False, True):
        model.train(mode)
        reference = copy.deepcopy(model)
        if "overrides" in options:
            reference.inside.train(options["overrides"]["inside"] == "train")
        gradients = []
        for run in (call, reference):
            torch.manual_seed(3)
            own = x.clone().requires_grad_()
            run(own).square().sum().backward()
            gradients.append(own.grad)
        torch.testing.assert_close(*gradients)
