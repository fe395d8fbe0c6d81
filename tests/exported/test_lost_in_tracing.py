"""What torch.export runs while it traces and keeps nothing of: refused by name, and the model left as it was."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import compile_modes as cm
from compile_modes.graph.dual import DualModule
from exported.python_decides import GaussianNoise
from exported.vectors import agree_in_modes, random_modes

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


class Calling(nn.Module):
    """A dropout, and a call in front of it."""

    def __init__(self, call):
        super().__init__()
        self.fc, self.drop, self.call = nn.Linear(6, 6), nn.Dropout(), call

    def forward(self, x):
        h = self.fc(x)
        self.call(self, h)
        return self.drop(h)


LOST = {
    "hook of a tensor": (lambda m, h: h.register_hook(lambda grad: -grad), r"CM329: .*Tensor\.register_hook"),
    "seed": (lambda m, h: torch.manual_seed(7), r"CM329: .*torch\.manual_seed"),
    "filled buffer": (lambda m, h: setattr(m, "empty", h.detach()), "CM305: .* a tensor where there was none"),
    "new buffer": (lambda m, h: m.register_buffer("new", h.detach()), "CM305: .* a tensor where there was none"),
}


@pytest.mark.parametrize("name", LOST)
def test_are_refused_by_name(name):
    call, says = LOST[name]
    model = Calling(call)
    model.register_buffer("empty", None)
    buffers, seeding = dict(model._buffers), torch.manual_seed
    with pytest.raises(cm.ExportError, match=says):
        cm.export(model, (X,))
    assert dict(model._buffers) == buffers
    assert torch.manual_seed is seeding
    assert "register_hook" in vars(torch.Tensor)


def test_hooks_on_the_gradients_of_modules_too():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout())
    handle = model[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(cm.ExportError, match=r"CM329: torch\.export drops hooks on the gradients of '0'"):
        cm.export(model, (X,))
    handle.remove()
    cm.export(model, (X,))


def test_inputs_made_in_inference_mode_are_inputs_like_others():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout())
    with torch.inference_mode():
        x = X.clone()
        module = cm.export(model, (x,))
    torch.testing.assert_close(module.eval()(X), model.eval()(X))


class SetsMore(nn.Module):
    """Its ``train()`` sets what ``forward`` reads."""

    def __init__(self):
        super().__init__()
        self.fc, self.std = nn.Linear(6, 6), 0.5

    def train(self, mode=True):
        self.std = 0.5 if mode else 0.0
        return super().train(mode)

    def forward(self, x):
        x = self.fc(x)
        return x + self.std * torch.randn_like(x) if self.std else x


def test_a_train_of_the_models_own_is_called_by_the_comparison():
    model = SetsMore()
    module = cm.export(model, (X,))
    assert isinstance(module, DualModule)
    assert model.std == 0.5
    for mode in (True, False):
        results = []
        for m in (model, module):
            torch.manual_seed(0)
            results.append(m.train(mode)(X))
        assert torch.equal(*results)


class Foreign(nn.Module):
    """An op whose flag is another module's."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return F.dropout(self.bn(self.fc(x)), 0.5, self.fc.training)


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(x), 1 if self.training else 0, {"training": self.training}


class Plain(nn.Module):
    """A tensor that is no buffer, which training may write."""

    def __init__(self, writes):
        super().__init__()
        self.fc, self.held, self.writes = nn.Linear(6, 6), torch.zeros(6), writes

    def forward(self, x):
        h = self.fc(x)
        if self.training and self.writes:
            self.held.add_(h.detach().mean(0))
        return h + self.held


def test_a_file_keeps_whose_flag_an_op_was_given():
    model, file = Foreign(), io.BytesIO()
    cm.save(cm.export(copy.deepcopy(model), (X,)), file)
    file.seek(0)
    assert agree_in_modes(model, cm.load(file), X, random_modes(model, 6, 0)) == 0


def test_constants_that_are_returned_are_those_of_the_mode():
    model = Constants()
    programs = [torch.export.export(model.train(mode), (X,)) for mode in (True, False)]
    module = cm.bind(programs[0], evaluation=programs[1])
    for mode in (True, False):
        assert module.train(mode)(X)[1:] == model.train(mode)(X)[1:]


@pytest.mark.parametrize("by", ["bind", "export"])
def test_tensors_that_are_equal_at_first_are_not_taken_for_one(by):
    model = nn.Sequential(Plain(True), Plain(False))
    if by == "export":
        module = cm.export(copy.deepcopy(model), (X,), verify=False)
    else:
        programs = [torch.export.export(copy.deepcopy(model).train(mode), (X,)) for mode in (True, False)]
        with pytest.warns(cm.ModeWarning, match="CM306"):
            module = cm.bind(programs[0], evaluation=programs[1])
    for mode in (True, True, False, True):
        torch.testing.assert_close(module.train(mode)(X), model.train(mode)(X))


def test_spectral_norm_beside_what_python_decides_follows_its_own_flag():
    model = nn.Sequential(spectral_norm(nn.Linear(6, 6)), GaussianNoise(True))
    module = cm.export(copy.deepcopy(model), (X,))
    assert not isinstance(module, DualModule)
    assert agree_in_modes(model, module, X, random_modes(model, 6, 0)) == 0
