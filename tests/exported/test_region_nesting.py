"""Every nesting of what switches grad mode, autocast and attention kernels, against eager, gradients included."""

import functools
import io
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import compile_modes as cm
from compile_modes import _compat
from compile_modes._compat import exporting
from compile_modes._compat.exporting import _Inference
from compile_modes.graph.dual import DualModule
from oracle import agrees, text

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
AUTOCAST = functools.partial(torch.autocast, "cpu", torch.bfloat16)
CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": AUTOCAST,
    "sdpa": functools.partial(sdpa_kernel, SDPBackend.MATH),
}
FEW = [
    ("autocast", "no_grad"),
    ("no_grad", "autocast"),
    ("inference", "enable_grad"),
    ("sdpa", "inference"),
    ("enable_grad", "no_grad"),
]
NESTINGS = list(itertools.product(CONTEXTS, repeat=2))
DEEP = list(itertools.product(CONTEXTS, repeat=3))


def named(nestings, few=None):
    """Parameters; those that are not among the few are slow."""
    marks = [() if few is None or names in few else (pytest.mark.slow,) for names in nestings]
    return [pytest.param(n, id="-".join(n), marks=m) for n, m in zip(nestings, marks, strict=True)]


class Nested(nn.Module):
    """Layers before, in and behind each context; a layer outside of all, so that there is always a gradient."""

    def __init__(self, names, two=False):
        super().__init__()
        self.before = nn.ModuleList(nn.Linear(4, 4) for _ in names)
        self.behind = nn.ModuleList(nn.Linear(4, 4) for _ in names)
        self.inmost, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.names, self.two = names, two

    def forward(self, x):
        y = self.level(x, 0) + self.outside(x)
        return (y, x) if self.two and self.training else y

    def level(self, x, depth):
        if depth == len(self.names):
            y = self.drop(self.norm(self.inmost(x).float()))[None, None]
            return F.scaled_dot_product_attention(y, y, y)[0, 0].float()
        with CONTEXTS[self.names[depth]]():
            before = self.before[depth](x)
            inside = self.level(x, depth + 1)
            behind = self.behind[depth](x)
        return before.float() + inside + behind.float()


def tolerance(names):
    return 2e-2 if "autocast" in names else 1e-5


def same(names, module, two=False, call=None, **options):
    model = Nested(names, two)
    model.load_state_dict(module.state_dict())
    agrees(model, module, call, [X], flips=1, steps=2, tolerance=tolerance(names), **options)


@pytest.mark.parametrize("names", named([*NESTINGS, *DEEP], NESTINGS[::3] + FEW))
@pytest.mark.every(6)
def test_exports_keep_every_nesting(names):
    module = cm.export(Nested(names), (X,))
    same(names, module)


@pytest.mark.slow
@pytest.mark.parametrize("names", named(FEW, FEW[:1]))
def test_so_do_two_programs_and_files(names):
    module = cm.export(Nested(names, two=True), (X,))
    assert isinstance(module, DualModule)
    file = io.BytesIO()
    cm.save(module, file)
    same(names, cm.load(file), two=True)
    same(names, module, two=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("names", named([*NESTINGS, *DEEP], FEW))
@pytest.mark.every(3)
def test_bound_programs_keep_it_or_warn(names, strict):
    if "inference" in names:
        pytest.skip("torch.export drops inference_mode(), and the program shows nothing of it")
    program = torch.export.export(Nested(names), (X,), strict=strict)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bound = cm.bind(program)
    said = [str(w.message) for w in caught if issubclass(w.category, cm.ModeWarning)]
    assert all("autocast regions of '' follow one another" in message for message in said)
    assert not said or ("autocast" in names and {"no_grad", "enable_grad"} & set(names))  # what splits a region
    assert said or names[-2:] != ("autocast", "no_grad") or (strict and names[0] == "no_grad")  # which changes nothing
    if not said and not (strict and "autocast" in names):  # traced without autocast: such a program's own checks fail
        same(names, bound)


@pytest.mark.every(3)
@pytest.mark.parametrize("names", named([*NESTINGS, *DEEP], FEW[:3]))
def test_the_backend_keeps_every_nesting(names, monkeypatch):
    stand_in = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr(_compat, "inductor", lambda mode, options: stand_in)
    module = Nested(names)
    same(names, module, call=torch.compile(module, backend="pt2e_modes"))


@pytest.mark.slow
@pytest.mark.parametrize("names", named(NESTINGS, FEW[:1]))
def test_compiled_exports_keep_every_nesting(names, monkeypatch):
    stand_in = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr(_compat, "inductor", lambda mode, options: stand_in)
    module = cm.export(Nested(names), (X,))
    same(names, module, call=torch.compile(module, backend="pt2e_modes"))


class Decorated(nn.Module):
    """Grad mode and autocast as decorators, and as a statement without a block."""

    def __init__(self):
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.drop = nn.Dropout(0.2)

    @torch.no_grad()
    def frozen(self, x):
        return self.drop(self.fc[0](x)) + self.awake(x)

    @torch.enable_grad()
    def awake(self, x):
        return self.fc[1](x)

    @torch.inference_mode()
    def inferred(self, x):
        return self.fc[2](x).float()

    @torch.autocast("cpu", torch.bfloat16)
    def cast(self, x):
        y = self.frozen(x) + self.inferred(x)
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        z = self.fc[3](x)
        torch.set_grad_enabled(before)
        return y.float() + z.float()

    def forward(self, x):
        return self.cast(x) + self.fc[4](x)


def test_decorators_and_statements_are_kept():
    module = cm.export(Decorated(), (X,))
    model = Decorated()
    model.load_state_dict(module.state_dict())
    agrees(model, module, inputs=[X], flips=1, tolerance=tolerance(["autocast"]))


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.enable_grad])
def test_the_grad_mode_that_export_is_called_in_does_not_matter(ambient):
    names = ("no_grad", "enable_grad")
    before = torch.is_grad_enabled()
    with ambient():
        module = cm.export(Nested(names), (X,))
        assert torch.is_grad_enabled() is (ambient is torch.enable_grad)
    assert torch.is_grad_enabled() is before
    assert text(module) == text(cm.export(Nested(names), (X,)))
    same(names, module)


def test_a_region_that_is_lost_after_all_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(exporting, "_looking_past_autocast", lambda original: original)
    with pytest.raises(cm.ExportError, match="has lost a region: linear_2 would run with gradients enabled") as caught:
        cm.export(Nested(("autocast", "no_grad")), (X,))
    assert caught.value.where == "linear_2 (owner 'inmost')"


def test_torch_is_left_as_it_was_also_by_exports_that_fail():
    class Fails(nn.Module):
        def forward(self, x):
            with torch.inference_mode():
                raise ZeroDivisionError

    def replaced():
        from torch.fx.experimental import proxy_tensor

        mode = torch.inference_mode
        return proxy_tensor.proxy_call, exporting.grad_pass._is_set_grad_enabled_sub_mod, mode.__enter__, mode.__exit__

    before = replaced()
    with pytest.raises(cm.ExportError, match="ZeroDivisionError"):
        cm.export(Fails(), (X,))
    assert replaced() == before
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_programs_carry_no_marks():
    from compile_modes.exported.provenance import Source
    from graphs import bodies

    for program in Source.of(cm.export(Nested(("autocast", "no_grad")), (X,))).programs.values():
        nodes = [node for body in bodies(program.graph_module) for node in body.graph.nodes]
        assert not [node for node in nodes if exporting.mark(node)]


def test_regions_that_have_something_between_them_do_not_warn():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with AUTOCAST():
                x = self.first(x)
            x = x.float()
            with AUTOCAST():
                return self.second(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", cm.ModeWarning)
        cm.bind(torch.export.export(nn.Sequential(Apart(), nn.Dropout(0.1)), (X,)))


def enabled_in_inference(s, x):
    with torch.inference_mode(), torch.enable_grad():
        return s.inner(x)


def set_in_inference(s, x):
    with torch.inference_mode(), torch.no_grad(), torch.set_grad_enabled(True):
        return s.inner(x)


def enabled_for_a_while(s, x):
    with torch.inference_mode():
        y = s.inner(x)
        with torch.enable_grad():
            y = s.inner(y)
        y = s.inner(y)
    return s.inner(y.clone())


def left_inference(s, x):
    with torch.inference_mode():
        with torch.inference_mode(False):
            z = s.inner(torch.ones(3, 4))
        y = s.inner(x)
    return z + y.clone()


def autocast_between(s, x):
    with torch.inference_mode(), AUTOCAST(), torch.enable_grad():
        return s.inner(x).float()


class Teacher(nn.Module):
    """What a function does with a layer in inference mode, beside one that trains."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.outer, self.drop, self.function = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.2), function

    def forward(self, x):
        return self.drop(self.outer(x)) + self.function(self, x)


@pytest.mark.parametrize(
    "function", [enabled_in_inference, set_in_inference, enabled_for_a_while, left_inference, autocast_between]
)
def test_nothing_enables_gradients_in_inference_mode(function):
    module = cm.export(Teacher(function), (X,))
    model = Teacher(function)
    model.load_state_dict(module.state_dict())
    agrees(model, module, inputs=[X], flips=1, tolerance=tolerance(["autocast"]))
    assert _Inference.inside == []


def test_inference_mode_around_an_export_does_not_matter():
    model = Teacher(enabled_for_a_while)
    outside = text(cm.export(model, (X,)))
    with torch.inference_mode():
        assert text(cm.export(model, (X,))) == outside
        assert torch.is_inference_mode_enabled()
