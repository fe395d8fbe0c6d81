"""What the deploy form can't have runs in its stock form, with one warning, and is right."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes import _compat
from compile_modes._compat import freezing
from compile_modes.forms.deploy.running import DEPLOYED
from deployed import X, agrees, frozen, net, runs_on_constants, says, settle


@pytest.mark.parametrize("freeze", [True, "always", 1, None, 0])
def test_other_values_are_refused(freeze):
    with pytest.raises(cm.OptionError, match="CM124: freeze is"):
        frozen(net(), freeze)(X)


def test_without_the_option_nothing_is_added(no_inductor, monkeypatch):
    handed = []

    def handover(mode, options):
        return lambda gm, inputs: handed.append(gm.print_readable(print_output=False)) or gm

    monkeypatch.setattr(_compat, "inductor", handover)
    known = len(DEPLOYED)
    for options in (None, {"freeze": False}):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(net(), backend="pt2e_modes", options=options)(X)
    assert len(handed) == 2
    assert len(set(handed)) == 1
    assert len(DEPLOYED) == known


@pytest.mark.slow
def test_dynamic_shapes_run_in_the_stock_form():
    model = net()
    call = torch.compile(model, backend="pt2e_modes", dynamic=True, options={"freeze": "auto"})
    (said,) = says(call, model, X)
    assert "CM418: " in said
    assert "sizes of inputs vary" in said
    assert says(call, model, torch.cat([X, X])) == []


@pytest.mark.slow
def test_float64_runs_in_the_stock_form():
    model = net().double()
    (said,) = says(frozen(model), model, X.double())
    assert "CM418: " in said
    assert "float64" in said


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(F.dropout(x, 0.5))


class Returns(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.given = given

    def forward(self, x):
        return self.fc(x), self.given(self.fc.weight)


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return self.fc(x) + self.count


class WritesInput(Random):
    def forward(self, x):
        return self.fc(x.clone().relu_()) + x.mul_(1.0)


@pytest.mark.parametrize("given", [torch.t, lambda weight: weight * 2], ids=["view", "value"])
def test_results_that_follow_from_weights_alone_are_the_callers(given):
    model = Returns(given).eval()
    call = frozen(model)
    x = torch.randn(3, 4)
    with pytest.warns(cm.ModeWarning, match="CM418"):
        out = settle(call, x)
    assert (out[1].data_ptr() == model.fc.weight.data_ptr()) is (given is torch.t)
    with torch.no_grad():
        out[1].mul_(3.0)
    agrees(call, model, x)


def test_state_that_eval_writes_is_written():
    model = Writes().eval()
    call = frozen(model)
    x = torch.randn(3, 4)
    results = [settle(call, x, calls=1) for _ in range(6)]
    assert model.count == 6
    torch.testing.assert_close(results[5] - results[0], torch.full((3, 4), 5.0))


def test_live_dropout_is_drawn():
    model = Random().eval()
    call = frozen(model)
    x = torch.ones(64, 4)
    one, other = settle(call, x), settle(call, x)
    assert not torch.equal(one, other)


def test_an_input_that_is_written_to_is():
    model = WritesInput().eval()
    (said,) = says(frozen(model), model, torch.randn(3, 4))
    assert "writes to an input" in said


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


@pytest.mark.slow
def test_what_inductor_refuses_at_run_time_runs_in_the_stock_form():
    model = Grouped().eval().bfloat16()
    x = torch.randn(2, 8, 6, 6).bfloat16()
    said = says(frozen(model), model, x, tolerance=5e-2)
    assert len(said) <= 1
    assert all("CM418" in text for text in said)


class TwoScalars(nn.Module):
    """What upstream folds into the wrong weights: a scalar behind each of two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.register_buffer("a", torch.tensor(2.0))
        self.register_buffer("b", torch.tensor(5.0))

    def forward(self, x):
        return self.other(self.one(x) * self.a) * self.b


@pytest.mark.slow
def test_scalars_behind_convolutions():
    model = TwoScalars().eval()
    call = frozen(model)
    assert says(call, model, X) == []
    model.a.fill_(3.0)
    assert says(call, model, X) == []
    assert runs_on_constants() == [True]


def test_a_failure_of_inductor_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(freezing, "freeze", lambda *_: 1 / 0)
    model = net()
    call = frozen(model)
    (said,) = says(call, model, X)
    assert "ZeroDivisionError" in said
    assert says(call, model, X) == []


@pytest.mark.slow
def test_wrong_results_are_found_before_they_are_used(monkeypatch):
    stock = freezing.with_constants

    def wrong(call, constants):
        return stock(
            call, {name: value.mul(1.1) if not value.is_mkldnn else value for name, value in constants.items()}
        )

    monkeypatch.setattr(freezing, "with_constants", wrong)
    model = net()
    (said,) = says(frozen(model), model, X)
    assert "frozen outputs differ" in said


def test_parameters_that_share_memory_run_in_the_stock_form():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight.data = model[0].weight.data
    (said,) = says(frozen(model), model, torch.randn(3, 4))
    assert "share memory" in said


@pytest.mark.slow
def test_within_a_step_of_an_optimizer():
    """The closure of L-BFGS runs while its step is open, in the same thread."""
    model = net()
    call = frozen(model)
    settle(call, X)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        agrees(call, model, X, calls=1)
        return loss

    start = time.monotonic()
    optimizer.step(closure)
    assert time.monotonic() - start < 5
    agrees(call, model, X)


@pytest.mark.slow
def test_tied_parameters_have_one_constant():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    call = frozen(model)
    x = torch.randn(3, 4)
    assert says(call, model, x) == []
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert says(call, model, x) == []
    assert runs_on_constants() == [True]


@pytest.mark.slow
def test_under_autocast_and_in_inference_mode():
    model = net()
    call = frozen(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = settle(model, X, calls=1)
            for _ in range(6):
                torch.testing.assert_close(settle(call, X, calls=1), expected, rtol=5e-2, atol=5e-2)
        with torch.inference_mode():
            expected = model(X)
            for _ in range(6):
                torch.testing.assert_close(call(X), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            model.fc[3].weight.mul_(-1.0)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = net()
        call = frozen(model)
        agrees_in_inference(call, model)
        model.fc[0].weight.add_(0.1)
        agrees_in_inference(call, model)
        model.conv1.weight[0, 0, 0, 0] += 1.0
        agrees_in_inference(call, model)


def agrees_in_inference(call, model):
    expected = model(X)
    for _ in range(5):
        torch.testing.assert_close(call(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_other_ways_of_calling():
    """Bound, forced into a mode, and under no_grad inside of the model."""
    model = net()
    bound = cm.bind(torch.export.export(net(), (X,))).eval()
    agrees(frozen(bound), model, X)
    agrees(frozen(net().train(), training=False), model, X)
    assert any(runs_on_constants())
