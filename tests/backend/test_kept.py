"""What a retrace before autograd would not preserve: kept as it came, a part of a graph or the whole, and said."""

import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import compile_modes as cm
from backend.nested import Net, X
from compile_modes import _compat
from graphs import graphs_compiled
from nets import IMAGE, ConvNet
from oracle import agrees, same_outputs, same_steps
from setups import compile_

pytestmark = pytest.mark.usefixtures("no_inductor")


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


# One transform of functorch, and two of them nested, stand for the others; one way to put a function into a graph, too.
ALIKE = ("func.grad", "jvp", "nonstrict_trace")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in ALIKE else []) for k in KEPT])
@pytest.mark.every(4)
def test_around_what_is_kept(kind):
    reference = Net(KEPT[kind])
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X], flips=2, steps=2)
    assert graphs_compiled() == 2
    for flags in (True, False):
        torch._dynamo.reset()
        expected, forced = copy.deepcopy(reference).train(not flags), copy.deepcopy(reference).train(flags)
        same_steps(expected, forced, compile_(forced, training=not flags), [X], steps=1, tolerance=1e-5)
    torch._dynamo.reset()
    overridden = compile_(reference.train(), overrides={"[bdl]*": "eval"})
    same_outputs(copy.deepcopy(reference).eval(), overridden, X, seeds=1, tolerance=1e-5)


# What is kept as it came and has a mode, with the owner of it.
KEPT_WITH_MODES = {
    "autograd.Function": (lambda net, x: Scaled.apply(net.fc(x), 0.2, net.training), ""),
    "vmap": (lambda net, x: torch.vmap(lambda v: net.drop(v * 2), randomness="different")(net.fc(x)), "drop"),
    "func.grad": (lambda net, x: torch.func.grad(lambda v: net.drop(v.sin()).sum())(net.fc(x)), "drop"),
}


@pytest.mark.parametrize("kind", KEPT_WITH_MODES)
@pytest.mark.every(4)
@pytest.mark.usefixtures("listening")
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
            same_outputs(expected, compile_(module, **options), X, seeds=1, tolerance=1e-5)


@pytest.mark.parametrize("function", [_allowed_dropout, _traced_dropout], ids=["allow_in_graph", "nonstrict_trace"])
@pytest.mark.usefixtures("listening")
def test_a_function_in_the_graph_with_a_mode_inside(function):
    module = Net(lambda net, x: function(net.fc(x)))
    with pytest.warns(cm.ModeWarning, match="Overrides would not reach"):
        compile_(module)(X)
    torch._dynamo.reset()
    compile_(module, training=True)(X)
    torch._dynamo.reset()
    with pytest.raises(cm.OverrideError, match="does not show"):
        compile_(module, training=False)(X)


@pytest.mark.usefixtures("listening")
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


class Unretraceable(nn.Module):
    """Makes a tensor of a type that Python's state decides, of which the graph shows the change and no more."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4))

    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        y = torch.ones(4)
        torch.set_default_dtype(torch.float32)
        return self.body(x) + y.float()


@pytest.mark.usefixtures("listening")
def test_what_cannot_be_captured_goes_on_as_it_came():
    reference = Unretraceable()
    module = copy.deepcopy(reference)
    with pytest.warns(cm.ModeWarning, match="hands a graph to Inductor as it came") as caught:
        agrees(reference, module, compile_(module), [torch.randn(3, 4)])
    assert len([w for w in caught if issubclass(w.category, cm.ModeWarning)]) == 1
    torch._dynamo.reset()
    with pytest.raises(cm.CaptureError, match="could not be retraced"):
        compile_(module, overrides={"body.1": "eval"})(torch.randn(3, 4))


def _under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.mm(x, x)
        return y, y.float()


def _with_kernel(x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])


@pytest.mark.parametrize("function", [_allowed, _under_autocast, _with_kernel])
def test_functions_that_a_retrace_would_not_preserve(function):
    x, y = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    expected = function(x)
    found = torch.compile(function, backend="pt2e_modes")(y)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, found)), strict=True):
        assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
        a.sum().backward(retain_graph=True)
        b.sum().backward(retain_graph=True)
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize("mode", [True, False])
def test_a_graph_may_end_in_another_grad_mode(mode):
    def function(x):
        y = x * 2
        torch.set_grad_enabled(not mode)
        return y, x * 3

    x = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(mode):
        expected = [t.requires_grad for t in function(x)]
    with torch.set_grad_enabled(mode):
        found = [t.requires_grad for t in torch.compile(function, backend="pt2e_modes")(x)]
    assert found == expected == [mode, not mode]
    assert torch.is_grad_enabled()


def test_a_graph_may_end_in_another_autocast_mode():
    def function(x):
        y = x @ x
        torch.set_autocast_enabled("cpu", True)
        return y, x @ x

    for compiled in (function, torch.compile(function, backend="pt2e_modes")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cm.ModeWarning)
            try:
                assert [t.dtype for t in compiled(torch.ones(2, 2))] == [torch.float32, torch.bfloat16]
            finally:
                torch.set_autocast_enabled("cpu", False)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_a_compiled_optimizer_steps_once(optimizer):
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        opt = optimizer(model.parameters(), lr=0.1)
        step = torch.compile(lambda opt=opt: opt.step(), backend="pt2e_modes") if compiled else opt.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cm.ModeWarning)
            for _ in range(3):
                model(torch.ones(2, 4)).square().sum().backward()
                step()
                opt.zero_grad()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[1], weights[0])


def test_functions_of_integers_compile_as_often_as_stock():
    for backend in ("aot_eager", "pt2e_modes"):
        torch._dynamo.reset()
        before = graphs_compiled()
        compiled = torch.compile(lambda n: torch.arange(n) * 2, backend=backend)
        for n in range(3, 9):
            assert torch.equal(compiled(n), torch.arange(n) * 2)
        assert graphs_compiled() - before == 2


@pytest.mark.usefixtures("listening")
def test_what_inductor_fails_on_goes_on_as_it_came(monkeypatch):
    def inductor(mode, options):
        def compile_fx(gm, example_inputs):
            if any(isinstance(n.target, torch._ops.OpOverload) for n in gm.graph.nodes):
                raise RuntimeError("no lowering\nand more")
            return gm.forward

        return compile_fx

    monkeypatch.setattr(_compat, "inductor", inductor)
    reference = ConvNet()
    module = copy.deepcopy(reference)
    with pytest.warns(cm.ModeWarning, match="as it came: RuntimeError: no lowering\n  what"):
        agrees(reference, module, compile_(module), [IMAGE], flips=1)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no lowering"):
        compile_(module, training=False)(IMAGE)
