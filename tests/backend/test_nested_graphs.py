"""Graphs inside graphs, and parts that a retrace would not preserve: what is captured, what is kept."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import compile_modes as cm
from compile_modes import _compat
from graphs import graphs_compiled
from oracle import agrees, same_state

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(7))
pytestmark = pytest.mark.usefixtures("no_inductor")


class Net(nn.Module):
    """A batch norm and a dropout, alone or as a body that ``inner`` runs in one way or another."""

    def __init__(self, inner: Callable[["Net", torch.Tensor], torch.Tensor], norm: bool = True) -> None:
        super().__init__()
        self.inner, self.norm = inner, norm
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4, eps=1e-3, momentum=0.03)
        self.drop, self.last = nn.Dropout(0.3), nn.Dropout(0.15)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return self.drop(self.bn(x) if self.norm else x)

    @torch.compiler.nested_compile_region
    def region(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.out(self.inner(self, x)))


def _save_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _save_products)


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


def _no_grad(net, x):
    with torch.no_grad():
        y = net.body(x)
    return y + net.fc(x)


def _kernel(net, x):
    q = net.body(x)[None]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2 if net.training else 0.0)[0]


CHECKPOINTS = {
    "checkpoint": lambda net, x: checkpoint(net.body, x, use_reentrant=False) + net.fc(x),
    "reentrant": lambda net, x: checkpoint(net.body, net.out(x), use_reentrant=True),
    "selective": lambda net, x: checkpoint(net.body, x, use_reentrant=False, context_fn=_selective),
    "nested": lambda net, x: checkpoint(
        lambda y: checkpoint(net.body, y, use_reentrant=False) * 2, x, use_reentrant=False
    ),
    "without-grad": lambda net, x: _no_grad(net, x) + checkpoint(net.body, x.sin(), use_reentrant=False),
}
# Bodies that may not write, as batch norm would in train: eval statistics or none.
BRANCHES = {
    "cond": lambda net, x: torch.cond(
        x.sum() > 0, lambda y: net.drop(y.sin()), lambda y: net.drop(y) + 1, (net.fc(x),)
    ),
    "region": lambda net, x: net.region(net.out(x)) + net.region(x),
}
REGIONS = {"inference": _inference, "no_grad": _no_grad, "sdpa_kernel": _kernel}
ALL = {**CHECKPOINTS, **BRANCHES, **REGIONS}
KINDS = pytest.mark.parametrize("kind", ALL)


def compile_(module, **options):
    return torch.compile(module, backend="pt2e_modes", options=options or None)


def make(kind):
    if kind == "inference" and torch.__version__ < "2.12":
        pytest.skip("stock torch 2.11 crashes on it")
    return Net(ALL[kind], norm=kind not in BRANCHES)


# cond: torch draws its masks anew in the backward pass, eager as well.
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "cond"])
def test_flips_and_steps(kind):
    reference = make(kind)
    module = copy.deepcopy(reference)
    # Eager computes a checkpoint's statistics twice, stock torch.compile once.
    oracle = torch.compile(reference, backend="aot_eager") if kind in CHECKPOINTS else reference
    agrees(reference, module, compile_(module), [X], oracle=oracle, flips=2, steps=2)
    assert graphs_compiled() == (4 if kind in CHECKPOINTS else 2), "captured whole, in both modes"


@KINDS
@pytest.mark.parametrize("flags", [True, False], ids=["flags-train", "flags-eval"])
@pytest.mark.parametrize("parts", [("bn", "last"), ("drop",), None], ids=["norm", "dropout", "all"])
def test_modes_reach_into_bodies(kind, flags, parts):
    reference = make(kind).train(flags)
    module = copy.deepcopy(reference)
    if parts is None:
        if kind == "sdpa_kernel" and not flags:
            pytest.skip("attention in eval has no probability")
        options = {"training": not flags}
        reference.train(not flags)
    elif "bn" in parts and (kind in BRANCHES or kind == "inference"):
        pytest.skip("has no batch norm")
    else:
        options = {"overrides": dict.fromkeys(parts, "eval" if flags else "train")}
        for part in parts:
            reference.get_submodule(part).train(not flags)
    oracle = torch.compile(reference, backend="aot_eager") if kind in CHECKPOINTS else reference
    compiled = compile_(module, **options)
    for seed in range(2):
        results = []
        for model, call in ((reference, oracle), (module, compiled)):
            torch.manual_seed(seed)
            model.zero_grad()
            output = call(X)
            output.square().sum().backward()
            results.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}, torch.get_rng_state()))
        torch.testing.assert_close(results[1], results[0])
        same_state(reference, module)


def test_autocast_is_applied_while_tracing():
    """Equal to stock to the last bit; eager rounds in other places of the backward pass."""
    reference, outputs = Net(_autocast), []
    module = copy.deepcopy(reference)
    for model, backend in ((reference, "aot_eager"), (module, "pt2e_modes")):
        compiled = torch.compile(model, backend=backend)
        for mode in (True, False, True):
            torch.manual_seed(0)
            model.train(mode).zero_grad()
            output = compiled(X)
            output.square().sum().backward()
            outputs.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}, model.state_dict()))
    torch.testing.assert_close(outputs[3:], outputs[:3], rtol=0, atol=0)
    same_state(reference, module, 0.0)
    torch.manual_seed(0)
    torch.testing.assert_close(module(X), output)
    assert graphs_compiled() == 4
    for training in (True, False):
        torch._dynamo.reset()
        forced = copy.deepcopy(module).train(not training)
        torch.manual_seed(0)
        output = compile_(forced, training=training)(X)
        torch.manual_seed(0)
        torch.testing.assert_close(output, copy.deepcopy(module).train(training)(X))
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
def test_checkpoints_still_recompute(kind, monkeypatch):
    def tower(net, y):
        return net.out((net.fc(y.sin()).sigmoid() @ net.fc.weight).exp().sin())

    def run(net, x):
        if kind == "nested":
            return checkpoint(
                lambda y: checkpoint(functools.partial(tower, net), y, use_reentrant=False) * 2, x, use_reentrant=False
            )
        options = {"context_fn": _selective} if kind == "selective" else {}
        return checkpoint(functools.partial(tower, net), x, use_reentrant=False, **options)

    ours = _graphs(Net(run), "pt2e_modes", monkeypatch)
    assert ours == _graphs(Net(run), None, monkeypatch)
    assert ours != _graphs(Net(tower), "pt2e_modes", monkeypatch), "nothing was checkpointed"


class Scaled(torch.autograd.Function):
    """Multiplies its gradient by 3, which nobody would derive from the forward."""

    @staticmethod
    def forward(ctx, x, p, training):
        ctx.scale = 3.0 if training else 5.0
        return F.dropout(x.clamp(-0.5, 0.5), p, training)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None, None


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def _hook(net, x):
    y = net.body(x)
    y.register_hook(lambda grad: grad * 2)
    return y.sin()


def _data(net, x):
    y = net.body(x).clone()
    y.data.mul_(2)
    return y.sin()


@torch.compiler.allow_in_graph
def _allowed(y):
    return Clipped.apply(y)


@torch.compiler.allow_in_graph
def _allowed_dropout(y):
    return F.dropout(y, 0.2, True)


@torch._dynamo.nonstrict_trace
def _traced(y):
    return Clipped.apply(y)


@torch._dynamo.nonstrict_trace
def _traced_dropout(y):
    return F.dropout(y, 0.2, True)


@torch.library.custom_op("compile_modes_tests::double", mutates_args=())
def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


_double.register_fake(torch.empty_like)
_double.register_autograd(lambda ctx, grad: grad * 2)

# What is kept as it came, without a mode of its own.
KEPT = {
    "autograd.Function": lambda net, x: Clipped.apply(net.body(x)),
    "hook": _hook,
    "data": _data,
    "vmap": lambda net, x: torch.vmap(lambda v: v.sin() * 2)(net.body(x)),
    "func.grad": lambda net, x: torch.func.grad(lambda v: v.sin().sum())(net.body(x)),
    "jvp": lambda net, x: sum(torch.func.jvp(torch.sin, (net.body(x),), (x,))),
    # Two transforms, the second of which takes what the first one wrapped.
    "jacrev": lambda net, x: net.drop(torch.func.jacrev(torch.sin)(net.body(x)).sum((2, 3))),
    "allow_in_graph": lambda net, x: _allowed(net.body(x)),
    "nonstrict_trace": lambda net, x: _traced(net.body(x)),
    "custom_op": lambda net, x: _double(net.body(x)),
    "vmap-in-checkpoint": lambda net, x: checkpoint(
        lambda y: net.drop(torch.vmap(lambda v: v.sin() * 2)(net.fc(y))), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_around_what_is_kept(kind):
    reference = Net(KEPT[kind])
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X], flips=2, steps=2)
    assert graphs_compiled() == 2
    for flags in (True, False):
        torch._dynamo.reset()
        expected, forced = copy.deepcopy(reference).train(not flags), copy.deepcopy(reference).train(flags)
        compiled = compile_(forced, training=not flags)
        results = []
        for model, call in ((expected, expected), (forced, compiled)):
            torch.manual_seed(0)
            output = call(X)
            output.square().sum().backward()
            results.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}))
        torch.testing.assert_close(results[1], results[0])
        same_state(expected, forced)


# What is kept as it came and has a mode, with the owner of it.
KEPT_WITH_MODES = {
    "autograd.Function": (lambda net, x: Scaled.apply(net.fc(x), 0.2, net.training), ""),
    "vmap": (lambda net, x: torch.vmap(lambda v: net.drop(v * 2), randomness="different")(net.fc(x)), "drop"),
    "func.grad": (lambda net, x: torch.func.grad(lambda v: net.drop(v.sin()).sum())(net.fc(x)), "drop"),
}


@pytest.mark.parametrize("kind", KEPT_WITH_MODES)
def test_modes_that_are_kept(kind):
    inner, owner = KEPT_WITH_MODES[kind]
    reference = Net(inner)
    module = copy.deepcopy(reference)
    with pytest.warns(cm.ModeWarning, match="Overrides would not reach"):
        agrees(reference, module, compile_(module), [X], flips=2, steps=2)
    for flags, other in ((True, "eval"), (False, "train")):
        module.train(flags)
        torch._dynamo.reset()
        with pytest.raises(cm.OverrideError, match="kept as Dynamo recorded it"):
            compile_(module, training=not flags)(X)
        with pytest.raises(cm.OverrideError, match="kept as Dynamo recorded it"):
            compile_(module, overrides={owner: other})(X)
        expected = copy.deepcopy(module)
        expected.last.train(not flags)
        for options in ({"overrides": {"last": other}}, {"training": flags, "overrides": {"last": other}}):
            torch._dynamo.reset()
            torch.manual_seed(0)
            output = compile_(module, **options)(X)
            torch.manual_seed(0)
            torch.testing.assert_close(output, expected(X))


@pytest.mark.parametrize("function", [_allowed_dropout, _traced_dropout], ids=["allow_in_graph", "nonstrict_trace"])
def test_a_function_in_the_graph_with_a_mode_inside(function):
    module = Net(lambda net, x: function(net.fc(x)))
    with pytest.warns(cm.ModeWarning, match="Overrides would not reach"):
        compile_(module)(X)
    torch._dynamo.reset()
    compile_(module, training=True)(X)
    torch._dynamo.reset()
    with pytest.raises(cm.OverrideError, match="does not show"):
        compile_(module, training=False)(X)


def test_bodies_that_cannot_be_traced_stay_as_they_came(monkeypatch):
    from compile_modes.backend import capture

    traced = capture._retrace

    def failing(gm, inputs):
        if "dropout" in gm.code and "running_mean" not in gm.code:
            raise ValueError("no")
        return traced(gm, inputs)

    monkeypatch.setattr(capture, "_retrace", failing)

    def run(net, x):
        return checkpoint(lambda y: net.drop(net.fc(y)), net.bn(x), use_reentrant=False)

    module = Net(run)
    module.last = nn.Identity()
    reference = copy.deepcopy(module)
    monkeypatch.setattr(reference, "forward", functools.partial(Net.forward, reference))
    with pytest.warns(cm.ModeWarning, match=r"would not reach .*owner 'drop'"):
        agrees(reference, module, compile_(module), [X], flips=1, steps=2)
    torch._dynamo.reset()
    module.train()
    compile_(module, overrides={"bn": "eval"})(X)
    with pytest.raises(cm.OverrideError, match="kept as Dynamo recorded it"):
        compile_(module, overrides={"drop": "eval"})(X)


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


def test_calls_of_one_region_have_modes_of_their_own():
    reference = Stack()
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X], flips=1, steps=2)
    for chosen in (1, 2, 3):
        torch._dynamo.reset()
        expected, forced = copy.deepcopy(reference).eval(), copy.deepcopy(reference).eval()
        expected.layers[chosen].drop.train()
        compiled = compile_(forced, overrides={f"layers.{chosen}.drop": "train"})
        torch.manual_seed(0)
        output = compiled(X)
        output.sum().backward()
        torch.manual_seed(0)
        torch.testing.assert_close(output, expected(X))
    torch._dynamo.reset()
    with pytest.raises(cm.OverrideError, match=r"layers\.3\.drop"):
        compile_(reference, overrides={"layers.4.drop": "eval"})(X)


@pytest.mark.parametrize("kind", ["while_loop", "scan", "map"])
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
            torch.manual_seed(0)
            output = compile_(module, training=not flags)(X)
            torch.manual_seed(0)
            torch.testing.assert_close(output, torch.compile(expected, backend="aot_eager")(X))


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
        torch.manual_seed(0)
        output = compile_(module, overrides={"last": other, "drop": other})(torch.cat([X] * 4, -1)[:, :4])
        torch.manual_seed(0)
        torch.testing.assert_close(output, expected(X))


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


@pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
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
        outputs = []
        stock = torch.compile(expected, backend="aot_eager")
        for call in (stock, compile_(module, overrides={"bn": other, "last": other})):
            torch.manual_seed(0)
            outputs.append(call(X))
            outputs[-1].sum().backward()
        assert torch.equal(*outputs)
        same_state(expected, module, 0.0)
        for a, b in zip(expected.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)
