"""Who decides, where that isn't the module whose op it is: another one that has its mode read, or two together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes._compat.readers import mode_reads
from compile_modes.graph.dual import DualModule, Follower
from exported.vectors import agree_in_modes, random_modes

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(4))


class Patches(nn.Module):
    """Takes some of the rows in train, so that sizes are others in what comes behind."""

    def forward(self, x):
        return x[:, torch.randperm(x.shape[1])[:3]] if self.training else x


class Mean(nn.Module):
    def forward(self, x):
        return x.sum(1) / x.shape[1]


class Siblings(nn.Module):
    """What is in the block follows the flag of a module beside it."""

    def __init__(self):
        super().__init__()
        self.fc, self.patches, self.between, self.block = nn.Linear(4, 4), Patches(), nn.Identity(), Mean()

    def forward(self, x):
        return self.block(self.patches(self.fc(x)))


class Norm(nn.Module):
    """Decides in a method that is called from outside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def update(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)

    def forward(self, x):
        return x - self.mean.clone()


class Policy(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.norm = Norm()
        for _ in range(depth):
            self.norm = nn.Sequential(self.norm)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        norm = self.norm
        while isinstance(norm, nn.Sequential):
            norm = norm[0]
        norm.update(x)
        return self.fc(norm(x))


class Child(nn.Module):
    """The flag of a child, or of several, decides about the root's own op."""

    def __init__(self, decide):
        super().__init__()
        self.decide, self.fc, self.a, self.b = decide, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(self.fc(x))
        return self.b(x * 2 if self.decide(self) else x)


class OnlyInEval(nn.Module):
    """Runs a part in eval only, which has modes of its own."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(5)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)

    def forward(self, x):
        x = self.fc(x)
        return x if self.training else self.attention(self.norm(x), x, x, need_weights=False)[0]


class Flag(nn.Module):
    """An op whose flag is not that of the module whose op it is."""

    def __init__(self, call):
        super().__init__()
        self.call, self.fc, self.drop, self.norm = call, nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.call(self, self.norm(self.fc(x)))


class Told(nn.Module):
    """Is told the mode of its parent."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, training):
        return F.dropout(self.fc(x), 0.3, training)


class Tells(nn.Module):
    def __init__(self):
        super().__init__()
        self.told = Told()

    def forward(self, x):
        return self.told(x, self.training)


class Beside(nn.Module):
    """Normalises by the flag of a batch norm that it doesn't call."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(5)

    def forward(self, x):
        norm = self.norm
        x = F.batch_norm(self.fc(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)
        return x.tanh()


ONE = {
    "flag-of-a-child": lambda: Flag(lambda net, x: F.dropout(x, net.drop.p, net.drop.training)),
    "flag-of-a-norm": Beside,
    "flag-of-a-linear": lambda: Flag(lambda net, x: F.dropout(x, 0.3, net.fc.training)),
    "probability-of-a-child": lambda: Flag(
        lambda net, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if net.drop.training else 0.0)
    ),
    "flag-that-is-handed-on": Tells,
    "siblings": Siblings,
    "method": lambda: Policy(0),
    "method-below": lambda: Policy(2),
    "child": lambda: Child(lambda net: net.b.training),
    "only-in-eval": OnlyInEval,
}
# In neither program, for the two modules are in one mode in both.
MIXED = {
    "train": lambda net, x: x * 2 if net.training and not net.norm.training else x,
    "eval": lambda net, x: x * 2 if not net.training and net.norm.training else x,
}
TWO = {
    "and": lambda net: net.training and net.a.training,
    "or": lambda net: net.b.training or net.fc.training,
}


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ONE)
def test_one_graph_follows_it(kind):
    model = ONE[kind]()
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,), verify=False)
    assert isinstance(module, torch.fx.GraphModule)
    assert agree_in_modes(reference, module, X, random_modes(reference, 8), tolerance=1e-7) == 0
    again = copy.deepcopy(module)
    assert agree_in_modes(reference, again, X, random_modes(reference, 2, 1), tolerance=1e-7) == 0


def test_what_runs_in_eval_only_is_loaded_with_its_modes(tmp_path):
    model = OnlyInEval()
    reference = copy.deepcopy(model)
    cm.save(cm.export(model, (X,)), tmp_path / "model.pt2")
    module = cm.load(tmp_path / "model.pt2")
    assert agree_in_modes(reference, module, X, random_modes(reference, 8), tolerance=1e-7) == 0


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("verify", [None, False])
def test_two_together_take_two_programs(kind, verify):
    model = Child(TWO[kind])
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,), verify=verify)
    assert isinstance(module, DualModule)
    followers = {name for name, m in module.named_modules() if isinstance(m, Follower)}
    assert followers == (set() if kind == "and" else {"b", "fc"})  # in each mode of the root, one decides: or not
    warned = agree_in_modes(reference, module, X, random_modes(reference, 8))
    assert warned == 0 if kind == "and" else 0 < warned < 10


def test_of_two_an_ops_flag_follows_both():
    model = Flag(lambda net, x: F.dropout(x, 0.3, net.training and net.fc.training))
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,))
    assert isinstance(module, DualModule)
    assert agree_in_modes(reference, module, X, random_modes(reference, 8)) == 0


@pytest.mark.parametrize("kind", MIXED)
def test_what_happens_in_mixed_modes_only_is_not_silent(kind):
    model = Flag(MIXED[kind])
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,))
    agree_in_modes(reference, module, X, random_modes(reference, 12))


def test_a_module_that_no_program_has_is_there_to_warn():
    class Halves(nn.Module):
        """In each mode a program of its own, by a module without state."""

        def __init__(self):
            super().__init__()
            self.chooses, self.fc = nn.Identity(), nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            return (y, y.sum()) if self.chooses.training else y

    model = Halves()
    module = cm.export(model, (X,))
    assert isinstance(module, DualModule)
    with pytest.warns(cm.ModeWarning, match="CM307: .*'chooses'"):
        module.chooses.eval()


def test_reads_of_torchs_own_layers_do_not_count():
    class Reads(nn.Module):
        def forward(self, x):
            return x + 1 if self.training else x

    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Sequential(Reads()), nn.Identity())
    found, by_others = set(), set()
    with mode_reads(model, found, by_others):
        model(X)
        copied = copy.deepcopy(model)
    assert (found, by_others) == ({"2.0"}, set())
    with mode_reads(model, found, by_others):
        assert model[1].training
    assert (found, by_others) == ({"1", "2.0"}, {"1"})
    assert "training" not in vars(nn.Module)
    assert copied.eval().training is False
    assert model.training


def test_what_is_wrong_in_mixed_modes_alone_becomes_two_programs(monkeypatch):
    """Which module decides was not found: here, because one of two is not asked for."""
    from compile_modes.exported.exporter import Exporter

    monkeypatch.setattr(Exporter, "unclear", lambda *_: {"fc"})
    model = Child(TWO["or"])
    reference = copy.deepcopy(model)
    module = cm.export(model, (X,))
    assert isinstance(module, DualModule)
    assert agree_in_modes(reference, module, X, random_modes(reference, 8)) > 0
