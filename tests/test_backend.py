import copy
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import compile_modes as cm
from compile_modes import _compat
from compile_modes._compat.frames import graphs_compiled
from compile_modes.backend.entry import Options

from nets import IMAGE, Activations, Attention, ConvNet, HardCoded, Norms, Parent, Regions, UnusedNorm  # isort: skip
from oracle import agrees, same_state  # isort: skip

STARTS = pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
MODELS = [
    pytest.param(ConvNet, IMAGE, id="conv"),
    pytest.param(Activations, torch.randn(3, 4, 6), id="activations"),
    pytest.param(Norms, torch.randn(3, 4, 5), id="norms"),
    pytest.param(Regions, IMAGE, id="regions"),
    pytest.param(Attention, torch.randn(2, 5, 8), id="attention"),
    pytest.param(UnusedNorm, torch.randn(3, 4), id="unused"),
]


def compile_(module, **options):
    return torch.compile(module, backend="pt2e_modes", options=options or None)


@pytest.mark.usefixtures("no_inductor")
class TestWithoutInductor:
    @pytest.mark.parametrize(("build", "x"), MODELS)
    def test_eager_models(self, build, x):
        reference = build()
        module = copy.deepcopy(reference)
        agrees(reference, module, compile_(module), [x])
        assert graphs_compiled() == 2

    @STARTS
    @pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
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
    def test_explicit_modes(self, kind, flags, options, equivalent):
        reference = ConvNet()
        module = copy.deepcopy(reference)
        if kind == "bound":
            module = cm.bind(torch.export.export(module, (IMAGE,)))
        reference.train(flags)
        module.train(flags)
        equivalent(reference)
        compiled = compile_(module, **options)
        for seed in range(3):
            torch.manual_seed(seed)
            expected = reference(IMAGE)
            torch.manual_seed(seed)
            torch.testing.assert_close(compiled(IMAGE), expected)
            same_state(reference, module)

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
        torch.manual_seed(0)
        output = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(output, model.train()(x))

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
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.5)

            def forward(self, x):
                x = self.first(x)
                torch._dynamo.graph_break()
                return self.second(x)

        model = Broken()
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


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


def test_what_cannot_be_captured_goes_on_as_it_came(no_inductor):
    reference = Unretraceable()
    module = copy.deepcopy(reference)
    with pytest.warns(cm.ModeWarning, match="hands a graph to Inductor as it came") as caught:
        agrees(reference, module, compile_(module), [torch.randn(3, 4)])
    assert len([w for w in caught if issubclass(w.category, cm.ModeWarning)]) == 1
    torch._dynamo.reset()
    with pytest.raises(cm.CaptureError, match="could not be retraced"):
        compile_(module, overrides={"body.1": "eval"})(torch.randn(3, 4))


def test_checkpoints_are_captured(no_inductor):
    reference = Checkpointed()
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [torch.randn(3, 4)])
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    output = compile_(module.train(), overrides={"body.1": "eval"})(x)
    torch.testing.assert_close(output, module.eval()(x))


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


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def _with_hook(y):
    y.register_hook(lambda grad: grad * 2)
    return y.sin()


def _inference(y):
    with torch.inference_mode():
        z = y * 2
    return y + z.clone()


def _data(y):
    z = y.clone()
    z.data.mul_(2)
    return z.sin()


class Around(nn.Module):
    """A batch norm and a dropout before something that a retrace would not preserve."""

    def __init__(self, inner):
        super().__init__()
        self.fc, self.bn, self.drop, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x):
        return self.out(self.inner(self.drop(self.bn(self.fc(x)))))


@pytest.mark.parametrize(
    "inner",
    [
        lambda y: Scaled.apply(y),
        _with_hook,
        _inference,
        _data,
        torch.vmap(lambda v: v.sin() * 2),
        torch.func.grad(lambda v: v.sin().sum()),
    ],
    ids=["autograd.Function", "hook", "inference_mode", "data", "vmap", "func.grad"],
)
def test_what_a_retrace_would_not_preserve_is_kept(inner, no_inductor):
    if inner is _inference and torch.__version__ < "2.12":
        pytest.skip("stock torch 2.11 crashes on it")
    reference = Around(inner)
    module = copy.deepcopy(reference)
    x = torch.randn(8, 4)
    agrees(reference, module, compile_(module), [x], flips=2)
    torch._dynamo.reset()
    output = compile_(module.train(), overrides={"bn": "eval", "drop": "eval"})(x)
    torch.testing.assert_close(output, module.eval()(x))


@torch.compiler.allow_in_graph
def _allowed(y):
    return Scaled.apply(y)


def _under_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.mm(x, x)
        return y, y.float()


def _with_kernel(x):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])


@pytest.mark.parametrize("function", [_allowed, _under_autocast, _with_kernel])
def test_functions_that_a_retrace_would_not_preserve(function, no_inductor):
    x, y = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    expected = function(x)
    found = torch.compile(function, backend="pt2e_modes")(y)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, found)), strict=True):
        assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
        a.sum().backward(retain_graph=True)
        b.sum().backward(retain_graph=True)
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.parametrize("mode", [True, False])
def test_a_graph_may_end_in_another_grad_mode(mode, no_inductor):
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


def test_a_graph_may_end_in_another_autocast_mode(no_inductor):
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
def test_a_compiled_optimizer_steps_once(optimizer, no_inductor):
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


def test_functions_of_integers_compile_as_often_as_stock(no_inductor):
    for backend in ("aot_eager", "pt2e_modes"):
        torch._dynamo.reset()
        before = graphs_compiled()
        compiled = torch.compile(lambda n: torch.arange(n) * 2, backend=backend)
        for n in range(3, 9):
            assert torch.equal(compiled(n), torch.arange(n) * 2)
        assert graphs_compiled() - before == 2


def test_nested_compile_regions_are_captured(no_inductor):
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 4)

        @torch.compiler.nested_compile_region
        def forward(self, x):
            return self.drop(self.fc(x))

    model, x = nn.ModuleList([Region(), Region()]), torch.randn(3, 4)
    compiled = torch.compile(lambda x: [m(x) for m in model], backend="pt2e_modes")
    torch.manual_seed(0)
    expected = [m(x) for m in model]
    torch.manual_seed(0)
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    found[1].sum().backward()
    gradient, model[1].fc.weight.grad = model[1].fc.weight.grad, None
    expected[1].sum().backward()
    torch.testing.assert_close(gradient, model[1].fc.weight.grad)


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


def test_options_are_split():
    options = Options.parse(None, {"training": False, "epilogue_fusion": True, "triton.cudagraphs": False})
    assert options == Options(False, {}, {}, {"epilogue_fusion": True, "triton.cudagraphs": False})
    assert options.explicit
    assert not Options.parse("reduce-overhead", None).explicit


def test_the_backend_is_found_without_an_import():
    assert "pt2e_modes" in torch._dynamo.list_backends(exclude_tags=())
