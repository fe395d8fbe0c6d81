"""What can't be packaged is refused by an error of ours, and the file before stays."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes._compat import aoti
from package.packages import Cnn, Small, cross_entropy, images, squares

X = torch.randn(6, 4)


class Returning(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.linear, self.what = nn.Linear(4, 4), what

    def forward(self, x):
        return self.what(self.linear(x))


class Overlapping(nn.Module):
    """A buffer that training writes, and another one in the same memory."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        both = torch.zeros(2, 4)
        self.register_buffer("mean", both[0])
        self.register_buffer("both", both)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0))
        return self.linear(x) - self.mean + self.both.sum()


class Writing(nn.Linear):
    def forward(self, x):
        return super().forward(x.add_(1))


class Equal(nn.Module):
    """Two parameters whose gradients are one value, which torch's joint export can't tell apart."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return (self.one + self.other).sum() + x.sum()


MEAN = {"loss": lambda out, *rest: out.mean()}
CASES = {
    "no loss": (Small(), (X,), {}, cm.PackageError, "CM014"),
    "loss of several": (Small(), (X,), {"loss": lambda out, y: out[0], "targets": (X,)}, cm.PackageError, "CM015"),
    "loss of integers": (Returning(lambda x: x), (X,), {"loss": lambda out: out.argmax()}, cm.PackageError, "CM015"),
    "no gradient": (Returning(torch.detach), (X,), MEAN, cm.PackageError, "CM016"),
    "an object": (Returning(lambda x: x), (object(),), MEAN, None, ""),
    "a set": (Returning(lambda x: (x, frozenset({1}))), (X,), {"modes": ["eval"]}, None, ""),
    "targets alone": (Small(), (X,), {"targets": (X,)}, cm.OptionError, "CM007"),
    "loss without train": (Small(), (X,), {**MEAN, "modes": ["eval"]}, cm.OptionError, "CM007"),
    "no function": (Small(), (X,), {"loss": "mse"}, cm.OptionError, "CM006"),
    "fixed option": (Small(), (X,), {"options": {"always_keep_tensor_constants": False}}, cm.OptionError, "CM008"),
    "no tuple": (Small(), X, MEAN, cm.OptionError, "CM009"),
    "one gradient of two": (Equal(), (X,), {}, cm.PackageError, "CM017"),
    "overlapping": (Overlapping(), (X,), MEAN, cm.PackageError, "CM017"),
    "writes its input": (Writing(4, 4), (X,), {**MEAN, "modes": ["train"]}, cm.PackageError, "CM019"),
    "writes its input in eval": (Writing(4, 4), (X,), {"modes": ["eval"]}, cm.PackageError, "CM019"),
    "on meta": (nn.Linear(4, 4, device="meta"), (X.to("meta"),), MEAN, None, ""),
    "unbound": (torch.export.export(Small(), (X,)).module(), (X,), MEAN, cm.ExportError, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_nothing_changes(name, faked, tmp_path):
    model, args, options, kind, code = CASES[name]
    path = tmp_path / "model.pt2"
    path.write_text("the file before")
    before = {key: value.clone() for key, value in model.state_dict().items() if not value.is_meta}
    modes = [module.training for module in model.modules()]
    with pytest.raises(kind or cm.CompileModesError) as error:
        cm.package(model, args, path, **options)
    assert error.value.code == code or not code
    assert path.read_text() == "the file before"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert modes == [module.training for module in model.modules()]


def test_a_path_is_tried_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(aoti, "compile_ahead", lambda *_: pytest.fail("it was compiled"))
    for path in (tmp_path, tmp_path / "none" / "model.pt2"):
        with pytest.raises(cm.ArchiveError, match=r"CM50[13]"):
            cm.package(Small(), (X,), path, modes=["eval"])
    assert not list(tmp_path.iterdir())


class Named(nn.Linear):
    def forward(self, x, *, scale, shift=None):
        return super().forward(x) * scale + (0 if shift is None else shift)


def test_arguments_by_name(faked, tmp_path):
    model = Named(4, 4)
    cm.package(model, (X,), tmp_path / "model.pt2", kwargs={"scale": X, "shift": 1.0}, modes=["eval"])
    packed = cm.load_package(tmp_path / "model.pt2").eval()
    wanted = model(X, scale=X, shift=1.0)
    torch.testing.assert_close(packed(X, shift=1.0, scale=X), wanted)
    with pytest.raises(cm.CallError, match=r"CM042.*by position"):
        packed(X, X, 1.0)
    for kwargs in ({"scale": X}, {"scale": X, "shift": 2.0}, {"scale": X, "shift": 1.0, "more": X}):
        with pytest.raises(cm.CallError, match="CM042"):
            packed(X, **kwargs)


def test_a_bound_module_has_its_sizes_and_stays_as_it_was(faked, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=16)
    bound = cm.export(Small(0.0), (X,), dynamic_shapes=({0: batch},)).eval()
    bound.bn.train()
    with pytest.raises(cm.OptionError, match="CM010"):
        cm.package(bound, (X,), tmp_path / "m.pt2", loss=squares, targets=(X,), dynamic_shapes=({0: batch},))
    with pytest.raises(cm.PackageError, match="CM013"):
        cm.package(bound, (X, X), tmp_path / "m.pt2", loss=squares, targets=(X,))
    cm.package(bound, (X,), tmp_path / "m.pt2", loss=squares, targets=(X,))
    assert (bound.training, bound.bn.training, bound.drop.training) == (False, True, False)
    packed = cm.load_package(tmp_path / "m.pt2").eval()
    for count in (1, 16):
        torch.testing.assert_close(packed(X[:1].repeat(count, 1))[0], bound.eval()(X[:1].repeat(count, 1))[0])
    with pytest.raises(cm.CallError, match=r"CM044.*\(17, 4\)"):
        packed(torch.ones(17, 4))
    packed.train()
    with pytest.raises(cm.CallError, match="CM044"):  # one value per channel has no variance, as eager says
        packed(X[:1], X[:1])


def test_a_failure_of_the_compiler_is_told(monkeypatch, tmp_path):
    def fails(*args):
        raise RuntimeError("CppCompileError: g++: not found\nmore")

    monkeypatch.setattr(aoti, "compile_ahead", fails)
    with pytest.raises(cm.PackageError, match=r"CM018.*'eval'.*g\+\+: not found\n") as error:
        cm.package(Small(), (X,), tmp_path / "m.pt2", modes=["eval"])
    assert isinstance(error.value.__cause__, RuntimeError)
    assert not list(tmp_path.iterdir())


def test_sizes_that_the_compiler_fixes_are_told(monkeypatch, tmp_path):
    """A compiled program that was given a size must not be called with another one."""

    def fixes(program, inputs, options):
        (node,) = [n for n in program.graph_module.graph.find_nodes(op="placeholder") if "tensors" in n.name]
        assert node.meta["val"].shape[0] == 6  # which is a guard
        return [], {}

    monkeypatch.setattr(aoti, "compile_ahead", fixes)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=16)},)}
    with pytest.raises(cm.PackageError, match=r"CM024.*x: float32\[s\d+, 4\] is now \[6, 4\]"):
        cm.package(Small(), (X,), tmp_path / "m.pt2", modes=["eval"], **shapes)


def test_a_torch_without_training_ahead_of_time_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(aoti, "missing", lambda: "torch._C._aoti.AOTIModelPackageLoader")
    with pytest.raises(cm.PackageError, match=r"CM005.*AOTIModelPackageLoader"):
        cm.package(Small(), (X,), tmp_path / "m.pt2", modes=["eval"])
    with pytest.raises(cm.PackageError, match="CM005"):
        cm.load_package(tmp_path / "m.pt2")


def test_the_model_is_not_touched(faked, tmp_path):
    model, (image, target) = Cnn(0.5), images(8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cm.package(model, (image,), tmp_path / "m.pt2", loss=cross_entropy, targets=(target,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


class WithParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.variance = nn.Parameter(torch.zeros(()))

    def forward(self, outputs, target):
        return (outputs - target).square().mean() * torch.exp(-self.variance) + self.variance


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, target):
        self.calls.add_(1)
        return (outputs - target).square().mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model: WithParameter(), "'variance'"),
        (lambda model: Counts(), "the buffer 'calls'"),
        (lambda model: lambda o, y: (o - y).square().mean() + model.weight.square().sum(), "'weight'"),
        (lambda model: lambda o, y: (o @ torch.ones(2, 1, requires_grad=True)).sum(), r"shape \(2, 1\)"),
    ],
    ids=["module", "buffer", "closure", "tensor"],
)
def test_a_loss_that_holds_what_trains_is_refused(loss, says, faked, tmp_path):
    """torch.export would make a constant of it, and its gradient would be missing without a word."""
    model, generator = nn.Linear(4, 2), torch.get_rng_state()
    with pytest.raises(cm.PackageError, match=f"CM025: .*{says}"):
        cm.package(
            model,
            (torch.ones(3, 4),),
            tmp_path / "x.pt2",
            loss=loss(model),
            targets=(torch.ones(3, 2),),
            modes=["train"],
        )
    assert not (tmp_path / "x.pt2").exists()
    assert torch.equal(generator, torch.get_rng_state())


def test_a_loss_with_class_weights_is_none_of_those(faked, tmp_path):
    """Nor are its names the model's."""

    class Named(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self._loss = nn.Module()
            self._loss.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x):
            return super().forward(x) * self._loss.weight

    model, loss = Named(), nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1.0, 0.1]))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    cm.package(model, (x,), tmp_path / "x.pt2", loss=loss, targets=(y,), modes=["train"])
    torch.testing.assert_close(cm.load_package(tmp_path / "x.pt2")(x, y)[0], loss(model(x), y))
