"""Buffers that are assigned, whose new values torch.export loses in children."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from exported.vectors import agree_in_modes, random_modes
from oracle import agrees

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


class Normalizer(nn.Module):
    """As rsl_rl's EmpiricalNormalization: statistics are assigned, and read before and after."""

    def __init__(self, no_grad, persistent=True):
        super().__init__()
        self.no_grad = no_grad
        self.register_buffer("mean", torch.zeros(4), persistent=persistent)
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("std", torch.ones(4))
        self.register_buffer("count", torch.tensor(0.0))

    def update(self, x):
        self.count += x.shape[0]
        delta, rate = x.mean(0) - self.mean, x.shape[0] / self.count
        self.mean = self.mean + rate * delta
        self.var = self.var + rate * (x.var(0) - self.var + delta * (x.mean(0) - self.mean))
        self.std = torch.sqrt(self.var)

    def forward(self, x):
        before = x * self.std
        if self.training:
            with torch.set_grad_enabled(not self.no_grad):
                self.update(x)
        return (before - self.mean) / (self.std + 1e-2)


class Policy(nn.Module):
    def __init__(self, no_grad, persistent, depth):
        super().__init__()
        self.norm = Normalizer(no_grad, persistent)
        for _ in range(depth):
            self.norm = nn.Sequential(self.norm)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x):
        return self.net(self.norm(x))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "not-persistent"])
@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "grad"])
@pytest.mark.every(3)
def test_assigned_buffers_are_written(no_grad, persistent, depth):
    reference, model = (Policy(no_grad, persistent, depth) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    agrees(reference, cm.export(model, (X,)), inputs=[X], tolerance=0.0)


def test_what_was_read_before_an_assignment_keeps_its_gradient():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((4,), 2.0))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            h = self.fc(x) * self.scale  # saved for backward
            if self.training:
                self.scale = self.scale * 0.5
            return h.tanh() * self.scale

    reference, model = (nn.Sequential(Scale(), nn.Linear(4, 4)) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    agrees(reference, cm.export(model, (X,)), inputs=[X], tolerance=0.0)


class Assigns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value
        self.fc = nn.Linear(4, 4)
        self.register_buffer("b", torch.zeros(4))
        self.register_buffer("other", self.b if value == "alias" else torch.zeros(4))

    def forward(self, x):
        h = self.fc(x)
        if self.training:
            self.b = {
                "shape": x[0, :2], "dtype": x[0].double(), "gradient": h.mean(0), "none": None, "alias": x[0] + 1,
            }[self.value]  # fmt: skip
        return h


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("shape", r"shape \(2,\)"),
        ("dtype", "float64"),
        ("gradient", "carries gradients"),
        ("none", "NoneType"),
        ("alias", "other names"),
    ],
)
def test_assignments_that_no_buffer_can_hold_are_refused_by_name(value, why):
    model = nn.Sequential(Assigns(value)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(cm.ExportError, match=why + r"(.|\n)*'0\.b'"):
        cm.export(model, (X,))
    assert not model[0]._forward_hooks
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_a_buffer_of_the_root_that_is_assigned_in_a_region(around):
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.drop, self.fc = nn.Dropout(0.3), nn.Linear(4, 4)

        def forward(self, x):
            with around():
                mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
            self.mean = mean.clone()
            with torch.no_grad():
                self.mean = torch.lerp(self.mean, x.mean(0), 0.2)
            return self.drop(self.fc(x)) + self.mean

    module = cm.export(Average(), (torch.randn(3, 4),))
    model = Average()
    model.load_state_dict(module.state_dict())
    agrees(model, module, inputs=[torch.randn(3, 4)], flips=2, tolerance=0.0)


class Center(nn.Module):
    """As DINO's centre and the codebooks of vector quantizers: written by its ``.data``."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("center", torch.zeros(4))

    def forward(self, x):
        y = x - self.center
        if self.training:
            new = self.center * 0.9 + x.detach().mean(0) * 0.1
            if self.how == "assign":
                self.center.data = new
            elif self.how == "copy":
                self.center.data.copy_(new)
            else:
                self.center.data[:2] = new[:2]
        return y


@pytest.mark.parametrize("how", ["assign", "copy", "index"])
def test_data_is_written(how):
    model = nn.Sequential(nn.Linear(4, 4), Center(how))
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,))
    assert agree_in_modes(reference, module, X, random_modes(reference, 4)) == 0
    assert "data" not in vars(torch.Tensor)


def test_data_of_another_shape_is_refused():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen.data = x.detach().mean(0)
            return x

    with pytest.raises(cm.ExportError, match=r"^CM305: .* shape \(4,\) for .* shape \(1,\)\n  where: an assignment to"):
        cm.export(Grows(), (X,))
