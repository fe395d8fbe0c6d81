"""docs/limits.md holds: each limit that is said to be warned of, or refused, is provoked, and answers by its code."""

import io
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm

PAGE = (Path(__file__).parents[1] / "docs/limits.md").read_text()
X, HEAD = torch.ones(6, 4), nn.Linear(4, 1)
pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


class Linear(nn.Module):
    """A linear layer, and another module after it."""

    def __init__(self, then):
        super().__init__()
        self.linear, self.then = nn.Linear(4, 4), then

    def forward(self, x):
        return self.then(self.linear(x))


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.function(self, x * self.weight)


class Merging(nn.Linear):
    def train(self, mode=True):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().train(mode)


class Writing(nn.Linear):
    def forward(self, x):
        return super().forward(x.add_(1.0))


class Frozen(Linear):
    def train(self, mode=True):
        super().train(mode)
        self.then.eval()
        return self


class Stopping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.dropout(x, 0.5, training=True)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Counting(nn.Module):
    """Keeps in Python what no program can see."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def norm(**settings):
    return Linear(nn.BatchNorm1d(4, **settings))


def untracked():
    model = norm()
    model.then.track_running_stats = False
    return model


def spectral():
    return Linear(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))


def attention(self, x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 * self.training)


def branch(self, x):
    return x * 2 if self.training else x


def per_batch(self, x):
    return torch.cond(x.sum() > 0, lambda x: F.batch_norm(x, self.mean, self.mean + 1), lambda x: x * 2.0, (x,))


def averages(self, x):
    with torch.no_grad():
        self.mean.mul_(0.9)
    return F.dropout(x - self.mean, 0.5, self.training)


def averaging():
    model = Called(averages)
    model.register_buffer("mean", torch.ones(4))
    return model


def in_branch():
    model = Called(per_batch)
    model.register_buffer("mean", torch.zeros(4))
    return model


def bound(model, *, training=True):
    return cm.bind(torch.export.export(model.train(training), (X,)))


def compiled(model, **options):
    return torch.compile(model, backend="pt2e_modes", options=options)(X)


def broken():
    """A model with a graph break in a loop: Dynamo leaves its dropout to eager mode."""

    def forward(self, x):
        for module in (self.drop,):
            torch._dynamo.graph_break()
            x = module(x)
        return x

    model = Called(forward)
    model.drop = nn.Dropout(0.5)
    step = torch.compile(Linear(model), backend="pt2e_modes", options={"overrides": {"*drop": "eval"}})
    for _ in range(2):
        step(X)


def recurrent():
    model = Called(lambda self, x: self.rnn(x)[0])
    model.rnn = nn.LSTM(4, 4, 2, dropout=0.5)
    return model


def recompiled(limit, **options):
    with torch._dynamo.config.patch(**limit):
        model = nn.Sequential(*[nn.Dropout(0.5) for _ in range(3)])
        step = torch.compile(Linear(model), backend="pt2e_modes", options=options)
        for number in range(4):
            for bit, module in enumerate(model):
                module.train(bool(number >> bit & 1))
            step(X)


def passed(model):
    return torch.compile(model, options={"pre_grad_custom_pass": cm.ModePass(training=True)})(X)


def of_unknown_operator():
    with torch.library._scoped_library("limits", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        file = io.BytesIO()
        cm.save(cm.bind(torch.export.export(Called(lambda _, x: torch.ops.limits.twice(x)), (X,))), file)
    file.seek(0)
    cm.load(file)


def noise(self, x):
    return F.dropout(x + torch.rand_like(x), 0.5, self.training)


def stops_within_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ torch.ones(4, 4)
        with torch.no_grad():
            z = x @ torch.ones(4, 4)
        return F.dropout(y + z, 0.5, self.training)


class Assigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.last = x[0, :2]
        return x + 1


def jitters(self, x):
    return (x * 2).tanh() if self.training else x


class Either(nn.Module):
    """Two modules decide together."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        return self.child(x).tanh() if self.training or self.child.training else self.child(x)


def twice():
    model = Called(lambda self, x: self.child(self.child(x)))
    model.child = nn.Linear(4, 4)
    return bound(model)


def quiet(self, x):
    with torch.no_grad():
        return x * 2


def replaced(new):
    return cm.replace_head(bound(Linear(nn.ReLU())), "then", new)


def two_in_train(self, x):
    y = F.dropout(x, 0.5, self.training)
    return (y, x) if self.training else y


def counting_and_drawing():
    def forward(self, x):
        if self.training:
            self.calls.add_(1)
        return F.dropout(x, 0.5, self.training)

    model = Called(forward)
    model.register_buffer("calls", torch.zeros(()))
    return model


# By the number of the limit and the code: what provokes it.
PROVOKED = {
    (1, "CM235"): lambda: bound(Called(noise)),
    (1, "CM240"): lambda: bound(averaging()),
    (2, "CM233"): lambda: bound(Called(lambda self, x: (y := F.dropout(x, 0.5, self.training), y + x)), training=False),
    (5, "CM325"): lambda: cm.export(Frozen(nn.BatchNorm1d(4)), (X,)),
    (5, "CM234"): lambda: bound(Frozen(nn.BatchNorm1d(4))),
    (6, "CM230"): lambda: bound(untracked()),
    (7, "CM230"): lambda: bound(Called(attention), training=False),
    (7, "CM135"): lambda: compiled(Called(attention).eval(), training=True),
    (8, "CM237"): lambda: bound(Linear(nn.Identity()), training=False),
    (9, "CM230"): lambda: bound(spectral(), training=False),
    (9, "CM134"): lambda: compiled(spectral().eval(), training=True),
    (10, "CM230"): lambda: bound(norm(momentum=None), training=False),
    (11, "CM232"): lambda: cm.bind(torch.export.export(norm().eval(), (X,), strict=True).module()),
    (13, "CM236"): lambda: cm.bind(torch.export.export(Linear(nn.Dropout(0.5)).eval(), (X,)).run_decompositions()),
    (14, "CM230"): lambda: bound(in_branch(), training=False),
    (14, "CM134"): lambda: compiled(in_branch().eval(), training=True),
    (18, "CM239"): lambda: bound(Called(stops_within_autocast)),
    (19, "CM302"): lambda: cm.export(Merging(4, 4), (X,)),
    (19, "CM303"): lambda: cm.export(Called(lambda self, x: x.item() if self.training else x), (X,)),
    (19, "CM305"): lambda: cm.export(Assigns(), (X,)),
    (19, "CM323"): lambda: cm.export(Called(lambda self, x: x * random.random()), (X,)),
    (19, "CM324"): lambda: cm.export(Linear(Called(lambda self, x: Stopping.apply(x))), (X,)),
    (20, "CM306"): lambda: cm.export(Called(jitters), (X,), probe=False),
    (20, "CM307"): lambda: cm.export(nn.Sequential(Either()), (X,)).get_submodule("0").eval(),
    (19, "CM321"): lambda: cm.export(Counting(), (X,), verify=True),
    (21, "CM410"): lambda: compiled(torch.export.export(Linear(nn.Dropout(0.5)), (X,)).module()),
    (22, "CM413"): lambda: compiled(Called(lambda _, x: Stopping.apply(x)), tune=True),
    (22, "CM134"): lambda: compiled(Called(lambda _, x: Stopping.apply(x)), training=False),
    (23, "CM141"): lambda: compiled(Called(branch), training=False),
    (23, "CM132"): lambda: compiled(Linear(Called(branch)), overrides={"then": "eval"}),
    (24, "CM142"): broken,
    (24, "CM133"): lambda: compiled(recurrent(), training=False),
    (24, "CM137"): lambda: compiled(norm(momentum=None), training=False),
    (25, "CM109"): lambda: compiled(Linear(nn.Dropout(0.5)), overrides={"linear": "eval"}),
    (26, "CM134"): lambda: passed(norm().eval()),
    (27, "CM416"): lambda: recompiled({"recompile_limit": 2}),
    (27, "CM417"): lambda: recompiled({"accumulated_recompile_limit": 2}, mode_vectors=1),
    (28, "CM419"): lambda: compiled(norm(), modes="data"),
    (28, "CM127"): lambda: compiled(cm.export(Called(jitters), (X,)), modes="data"),
    (35, "CM519"): of_unknown_operator,
    (37, "CM418"): lambda: torch.no_grad()(compiled)(Called(lambda _, x: x + torch.rand_like(x)), freeze="auto"),
    (38, "CM019"): lambda: cm.package(Writing(4, 4), (X,), io.BytesIO(), modes=["eval"]),
    (38, "CM025"): lambda: cm.package(
        nn.Linear(4, 4), (X,), io.BytesIO(), loss=lambda y: HEAD(y).sum(), modes=["train"]
    ),
    (41, "CM916"): lambda: cm.diff(HEAD, HEAD),
    (42, "CM259"): lambda: cm.lora(bound(Linear(nn.ConvTranspose1d(6, 2, 2))), "then"),
    (42, "CM261"): lambda: cm.merge(cm.lora(bound(Linear(nn.Conv1d(6, 6, 2, groups=2))), "then")),
    (42, "CM251"): lambda: cm.lora(cm.export(Called(jitters), (X,)), "*"),
    (43, "CM270"): lambda: cm.replace_head(twice(), "child", nn.Identity()),
    (43, "CM272"): lambda: replaced(Called(jitters)),
    (43, "CM273"): lambda: replaced(Called(quiet)),
    (43, "CM274"): lambda: replaced(Called(lambda _, x: (x, x))),
    (45, "CM157"): lambda: cm.sample(Called(lambda s, x: F.dropout(x, 0.5) if x.sum() > 0 else x), X),
    (47, "CM155"): lambda: cm.sample(Called(two_in_train), X),
    (47, "CM156"): lambda: cm.sample(counting_and_drawing(), X),
}
# Provoked elsewhere, for they take a graph that is made for it, or a torch that is.
ELSEWHERE = {
    (18, "CM304"),
    (22, "CM411"),
    (22, "CM401"),
    (31, "CM415"),
    (45, "CM158"),
    (48, "CM064"),
    (48, "CM065"),
    (48, "CM073"),
    (49, "CM957"),
    (49, "CM958"),
}


# Where torch.export tells the result of an eval dropout from its input, there is nothing to warn of.
TOLD_APART = {(2, "CM233")} if torch.__version__ < "2.14" else set()


@pytest.mark.parametrize(("limit", "code"), [key for key in PROVOKED if key not in TOLD_APART], ids=str)
def test_what_a_limit_says_has_its_code(limit, code, no_inductor):
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PROVOKED[limit, code]()
        except cm.CompileModesError as error:
            said.append(error.code)
    said += [warning.message.code for warning in caught if issubclass(warning.category, cm.ModeWarning)]
    assert code in said


def test_all_codes_of_the_page_are_provoked():
    limits = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    named = {(int(limit.partition(".")[0]), code) for limit in limits for code in re.findall(r"\[(CM\d+)\]", limit)}
    assert named == PROVOKED.keys() | ELSEWHERE
