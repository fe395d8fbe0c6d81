"""Graphs that no form has work in are not captured, and nothing is lost by that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import compile_modes as cm
from compile_modes.backend import entry
from compile_modes.backend.needed import may_lower
from oracle import agrees
from setups import compile_

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


class Applied(nn.Module):
    """Norms, a buffer and a function that is given all of it."""

    def __init__(self, run):
        super().__init__()
        self.fc, self.bn, self.drop, self.run = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), run
        self.lstm = nn.LSTM(4, 4)
        self.register_buffer("state", torch.ones(4))

    def forward(self, x):
        return self.run(self, self.fc(x))


def _twin(m, x):
    with torch.no_grad():
        m.state.mul_(0.5).add_(m.fc.weight[0])
    return x * m.state


def _view(m, x):
    view = m.state.view(2, 2)[0]
    view.add_(x.detach()[0, :2])
    return x / m.state


def _out(m, x):
    torch.add(m.state, 1.0, out=m.state)
    return x * m.state


def _item(m, x):
    m.state[0] = x.detach().sum()
    return x + m.state


NOTHING_TO_DO = {
    "dropout": lambda m, x: m.drop(x),
    "batch norm": lambda m, x: m.drop(m.bn(x)),
    "in place": lambda m, x: F.relu(m.bn(x), inplace=True) + 1,
    "buffer read twice": lambda m, x: x * m.state + m.state,
    "buffer written last": lambda m, x: (m.state.add_(1), x)[1],
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if m.training else 0.0),
    "checkpoint": lambda m, x: checkpoint(lambda y: m.drop(m.fc(y)), x, use_reentrant=False),
}
SOMETHING_TO_DO = {
    "recurrent": lambda m, x: m.lstm(x)[0],
    "shared norm": lambda m, x: m.bn(m.bn(x)),
    "norm read beside": lambda m, x: m.bn(x) / m.bn.running_var.sqrt(),
    "in place and read": _twin,
    "by a view": _view,
    "by out=": _out,
    "by an item": _item,
    "norm in a checkpoint": lambda m, x: checkpoint(lambda y: m.bn(m.fc(y)), x, use_reentrant=False),
}


def graph_of(module):
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    torch.compile(module, backend=backend)(X)
    return graphs[0]


@pytest.mark.parametrize("name", [*NOTHING_TO_DO, *SOMETHING_TO_DO])
def test_what_a_form_may_have_work_in(name):
    run = {**NOTHING_TO_DO, **SOMETHING_TO_DO}[name]
    with torch._dynamo.config.patch(allow_rnn=True):
        assert may_lower(graph_of(Applied(run))) is (name in SOMETHING_TO_DO)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", NOTHING_TO_DO)
def test_without_a_capture_nothing_is_lost(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("captured")

    monkeypatch.setattr(entry, "capture", refuse)
    reference = Applied(NOTHING_TO_DO[name])
    del reference.lstm
    module = copy.deepcopy(reference)
    agrees(reference, module, compile_(module), [X], flips=2, steps=2)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="captured"):
        compile_(copy.deepcopy(reference), training=False)(X)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", ["batch norm", "shared norm"])
def test_bound_modules_likewise(name):
    model = Applied({**NOTHING_TO_DO, **SOMETHING_TO_DO}[name])
    del model.lstm
    module = cm.bind(torch.export.export(copy.deepcopy(model), (X,)))
    assert may_lower(graph_of(copy.deepcopy(module))) is (name in SOMETHING_TO_DO)
    agrees(model, module, compile_(module), [X], flips=2, steps=2)
