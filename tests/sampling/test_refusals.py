"""What ``sample`` refuses, and what it runs in a loop, saying so."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from sampling.kinds import Called, X


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))


def code(kind, *args, **kwargs):
    with pytest.raises(kind) as error:
        cm.sample(*args, **kwargs)
    return error.value.code


@pytest.mark.parametrize(
    ("said", "kind", "options"),
    [
        ("CM151", cm.OptionError, {"n": 0}),
        ("CM151", cm.OptionError, {"n": True}),
        ("CM151", cm.OptionError, {"chunk": 0}),
        ("CM162", cm.OptionError, {"seed": "0"}),
        ("CM152", cm.OptionError, {"reduce": "mean"}),
        ("CM153", cm.OptionError, {"which": ()}),
        ("CM153", cm.OptionError, {"which": [3]}),
        ("CM160", cm.OptionError, {"reduce": "mean_std", "n": 1}),
        ("CM109", cm.OverrideError, {"which": ("drop*",)}),
    ],
)
def test_bad_options(said, kind, options):
    model = net()
    flags = [m.training for m in model.modules()]
    assert code(kind, model, X, **options) == said
    assert [m.training for m in model.modules()] == flags


def test_near_matches():
    model = nn.ModuleDict({"drop": nn.Dropout(0.5), "norm": nn.BatchNorm1d(8)})
    model.forward = lambda x: model["drop"](model["norm"](x))
    with pytest.raises(cm.OverrideError, match="'drop'"):
        cm.sample(model, X, which=("dorp",))
    with pytest.raises(cm.OverrideError):
        cm.sample(model, X, which=("norm",))  # has a mode, and draws nothing


def test_what_can_not_be_sampled():
    assert code(cm.SampleError, torch.relu, X) == "CM150"
    assert code(cm.SampleError, nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)), X) == "CM154"
    assert code(cm.SampleError, torch.export.export(net().eval(), (X,)).module(), X) == "CM161"


def test_another_structure_in_train():
    model = Called(lambda s, x: (F.dropout(x, 0.5, s.training), x) if s.training else x)
    assert code(cm.SampleError, model, X, which=("",)) == "CM155"
    assert code(cm.SampleError, model, X) == "CM155"


@pytest.mark.parametrize("hard_coded", [False, True])
def test_a_norm_and_a_dropout_of_one_module(hard_coded):
    """The norm stays in eval, or in train where the model always has it so."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("var", torch.ones(8))

        def forward(self, x):
            y = F.batch_norm(x, self.mean, self.var, training=self.training or hard_coded)
            return F.dropout(torch.ones_like(x), 0.5, self.training) * 0 + y

    model = Mixed().eval()
    theirs = F.batch_norm(X, None if hard_coded else model.mean, None if hard_coded else model.var, training=hard_coded)
    torch.testing.assert_close(cm.sample(model, X, n=2)[1], theirs)
    assert not model.mean.any()


def test_a_module_that_does_more_in_train():
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x):
            if self.training:
                self.seen.add_(x.mean(0))
            return F.dropout(x, 0.5, self.training) + self.seen

    model = Codebook()
    assert code(cm.SampleError, model, X) == "CM156"
    assert not model.seen.any()
    assert model.training


class Deciding(nn.Module):
    """Python decides by a value, which no graph shows; a norm and a counter stand beside the dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.drop(self.norm(x)) + self.calls if float(x.sum()) > -100 else x


@pytest.mark.parametrize("compiled", [False, True])
def test_what_can_not_be_captured_is_called_in_a_loop(compiled):
    model = Deciding().eval()
    module = torch.compile(model, backend="eager") if compiled else model
    with pytest.warns(cm.ModeWarning, match="CM157"):
        result = cm.sample(module, torch.ones(4, 8), n=200)
    assert {round(v, 3) for v in result.unique().tolist()} == {1.0, 3.0}
    assert 0.4 < (result == 1.0).float().mean() < 0.6
    assert model.calls == 0
    assert model.norm.num_batches_tracked == 0
    assert not model.drop.training
    mean, _ = cm.sample(module, torch.ones(4, 8), n=5, reduce="mean_std")
    assert mean.shape == (4, 8)
    assert torch.equal(cm.sample(module, X, n=2, seed=1), cm.sample(module, X, n=2, seed=1))


def test_a_loop_has_gradients():
    model = Deciding()
    x = torch.ones(4, 8, requires_grad=True)
    with pytest.warns(cm.ModeWarning, match="CM157"):
        cm.sample(model, x, n=3).sum().backward()
    assert x.grad.any()
    assert model.norm.weight.grad.any()


def test_an_op_without_a_rule_runs_in_a_loop_and_is_named():
    packed = nn.LSTM(8, 8, 2, dropout=0.5)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = packed

        def forward(self, x):
            lengths = torch.tensor([3, 2])
            y, _ = self.lstm(nn.utils.rnn.pack_padded_sequence(x, lengths))
            return y.data

    with pytest.warns(cm.ModeWarning, match="CM15[78]"):
        result = cm.sample(Packed(), torch.ones(3, 2, 8), n=4)
    assert result.shape == (4, 5, 8)
    assert (result[0] != result[1]).any()


def test_a_dynamic_shape_runs_in_a_loop_and_is_named():
    @torch.library.custom_op("sampling_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        assert not torch._C._functorch.is_batchedtensor(x)
        return x * 2

    doubled.register_fake(lambda x: torch.empty_like(x))
    doubled.register_vmap(lambda info, dims, x: (_ for _ in ()).throw(RuntimeError("no rule")))
    model = Called(lambda s, x: doubled(s.drop(x)))
    with pytest.warns(cm.ModeWarning, match=r"CM158.*sampling_tests") as said:
        result = cm.sample(model, torch.ones(5, 8), n=200)
    assert len([w for w in said if "CM158" in str(w.message)]) == 1
    cm.sample(model, torch.ones(5, 8), n=3)  # not said again, or it would be an error
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert 0.45 < (result == 0).float().mean() < 0.55


def test_an_interrupted_call_leaves_everything_as_it_was():
    def interrupt(self, x):
        if self.drop.training:
            raise KeyboardInterrupt
        return self.drop(x)

    model = Called(interrupt)
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    model.drop.p, model.extra = 0.5, nn.Dropout(0.1)
    with pytest.raises(KeyboardInterrupt):
        cm.sample(model, X)
    assert [m.training for m in model.modules()][: len(flags)] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_python_random_numbers_are_seeded_and_put_back():
    class Skipping(nn.Linear):
        def forward(self, x):
            return x if self.training and random.random() < 0.5 else super().forward(x)

    model = Skipping(8, 8)
    state = random.getstate()
    with pytest.warns(cm.ModeWarning, match="CM157"):
        result = cm.sample(model, X, n=30, seed=0)
    assert random.getstate() == state
    assert torch.equal(result, cm.sample(model, X, n=30, seed=0))
    assert len(result.unique(dim=0)) == 2


def test_results_that_do_not_fit_together():
    def varying(self, x):
        return self.drop(x)[: int(torch.randint(1, 5, ()))]

    with pytest.warns(cm.ModeWarning, match="CM157"), pytest.raises(cm.SampleError, match="CM159"):
        cm.sample(Called(varying), X, n=30)
