"""A dropout in eval returns the tensor that it is given, in train it does not: the two are kept apart, or warned of."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes.exported.provenance import Source
from compile_modes.graph.dual import DualModule
from oracle import agrees, same_outputs, text

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3))
KINDS = [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout]


def again(h, drop):
    return h + drop(h)


def product(h, drop):
    return h * drop(h)


def in_a_list(h, drop):
    return torch.cat([h, drop(h)])


def returned(h, drop):
    return h, drop(h)


def later(h, drop):
    return drop(h) * 2 + h


def twice(h, drop):
    return drop(h) * 2 + drop(h)


def chained(h, drop):
    return h + drop(drop(h))


def through_contiguous(h, drop):
    return drop(h).contiguous() * h


def through_a_view(h, drop):
    return drop(h).reshape(-1) + h.reshape(-1)


def in_place_on_the_input(h, drop):
    dropped = drop(h)
    h.mul_(2)
    return dropped + 1


def in_place_on_the_result(h, drop):
    dropped = drop(h)
    dropped.mul_(2)
    return dropped + h


def in_place_on_a_view(h, drop):
    dropped = drop(h)
    h[0].zero_()
    return dropped


def in_a_region(h, drop):
    with torch.no_grad():
        y = h * 2 + drop(h)
    return y + h


def operand_of_a_region(h, drop):
    dropped = drop(h)
    with torch.no_grad():
        y = h * 2 + dropped
    return y + 1


def operand_twice(h, drop):
    dropped = drop(h)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = torch.mm(dropped.flatten(1), h.flatten(1).t())
    return y.float()


def returned_from_a_region(h, drop):
    with torch.no_grad():
        k = h * 1
        dropped = drop(k)
    return k + dropped


def in_place_behind_a_region(h, drop):
    with torch.no_grad():
        y = drop(h * 2)
    return y.relu_()


def without_reuse(h, drop):
    return drop(drop(h)).relu().reshape(-1).contiguous() * 2


def region_without_reuse(h, drop):
    with torch.no_grad():
        y = drop(h * 2)
    return y.relu()


REUSING = [
    again, product, in_a_list, returned, later, twice, chained, through_contiguous, through_a_view,
    in_place_on_the_input, in_place_on_the_result, in_place_on_a_view, in_a_region, operand_of_a_region, operand_twice,
    returned_from_a_region, in_place_behind_a_region,
]  # fmt: skip
CLEAR = [without_reuse, region_without_reuse]


class Model(nn.Module):
    """``two`` makes Python decide what is returned, so that both programs are kept."""

    def __init__(self, body, drop, two=False):
        super().__init__()
        self.fc, self.other, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), drop
        self.body, self.two = body, two

    def forward(self, x):
        y = self.body(self.fc(x), self.drop)
        return (y, self.other(x), x) if self.two and self.training else (y, self.other(x))


class Two(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return (self.part(x), x) if self.training else self.part(x)


def parts_in_eval(module, *names):
    module.eval()
    for name in names:
        module.get_submodule(name).train()
    return module


@pytest.mark.parametrize("two", [False, True], ids=["one-graph", "two-programs"])
@pytest.mark.parametrize("body", [*REUSING, *CLEAR])
@pytest.mark.every(10)
def test_exports_equal_eager_whoever_is_awake(body, two):
    model = Model(body, nn.Dropout(0.5), two)
    module = cm.export(model, (X,))
    assert isinstance(module, DualModule) is two
    file = io.BytesIO()
    cm.save(module, file)
    for ours in (module, cm.load(file)):
        model.load_state_dict(ours.state_dict())
        same_outputs(parts_in_eval(model, "drop"), parts_in_eval(ours, "drop"), X)
        agrees(model, ours, inputs=[X], flips=2, steps=2, tolerance=0.0, touch=lambda m: m.drop.train(not m.training))
        agrees(model, ours, inputs=[X], flips=1, steps=1, tolerance=0.0)
        assert "exported in eval" not in cm.explain(ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [again, in_a_list, in_a_region])
@pytest.mark.every(3)
def test_dropouts_of_all_kinds_are_kept_apart(kind, body):
    model = Model(body, kind(0.5), two=True)
    module = cm.export(model, (IMAGES,))
    same_outputs(parts_in_eval(model, "drop"), parts_in_eval(module, "drop"), IMAGES)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "call",
    [
        lambda h, t: torch.ops.aten.dropout.default(h, 0.5, t),
        lambda h, t: torch.feature_dropout(h, 0.5, t),
        lambda h, t: F.alpha_dropout(h, 0.5, t),
        lambda h, t: F.dropout2d(h[None], 0.5, t)[0],
        lambda h, t: torch.native_dropout(h, 0.5, t)[0],
    ],
)
def test_functional_dropouts_are_kept_apart_also_inverted_ones(call):
    class Functional(nn.Module):
        def __init__(self, inverted=False):
            super().__init__()
            self.fc, self.inverted = nn.Linear(4, 4), inverted

        def forward(self, x):
            h = self.fc(x)
            return h + call(h, self.training is not self.inverted)

    model = Functional(inverted=True)
    module = cm.export(model, (IMAGES,))
    for mode in (True, False):
        same_outputs(model.train(mode), module.train(mode), IMAGES)
    model = Two(Functional())
    module = cm.export(model, (IMAGES,))
    same_outputs(parts_in_eval(model, "part"), parts_in_eval(module, "part"), IMAGES)


def test_dropouts_in_place_are_left_alone():
    model = Model(lambda h, drop: (drop(h), h), nn.Dropout(0.5, inplace=True), two=True)
    module = cm.export(model, (X,))
    same_outputs(parts_in_eval(model, "drop"), parts_in_eval(module, "drop"), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = cm.bind(torch.export.export(Model(model.body, nn.Dropout(0.5, inplace=True)).eval(), (X,)))
    assert "exported in eval" not in cm.explain(bound)


def test_a_program_that_reuses_nothing_reads_as_torch_exports_it():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x):
            with torch.no_grad():
                y = self.second(self.first(x)).relu()
            return self.second(self.first(x)) + y

    model = Plain()
    programs = Source.of(cm.export(model, (X,))).programs
    for mode in (True, False):
        ours = programs["train" if mode else "eval"]
        theirs = torch.export.export(model.train(mode), (X,))
        assert text(ours.module()) == text(theirs.module())
        assert [n.name for n in ours.graph.nodes] == [n.name for n in theirs.graph.nodes]
        assert str(ours.graph_signature) == str(theirs.graph_signature)


@pytest.mark.filterwarnings("ignore:CM239")  # one of them switches grad mode within autocast, which is said as well
@pytest.mark.parametrize("body", REUSING)
def test_binding_an_eval_export_warns_of_reuse(body):
    program = torch.export.export(Model(body, nn.Dropout(0.5)).eval(), (X,))
    with pytest.warns(cm.ModeWarning, match="exported in eval mode have several users: dropout"):
        bound = cm.bind(program)
    assert "exported in eval: users of the input of" in cm.explain(bound)
    assert "exported in eval: users of the input of" in cm.explain(program)


@pytest.mark.parametrize("body", CLEAR)
def test_binding_an_eval_export_without_reuse_does_not_warn(body):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = cm.bind(torch.export.export(Model(body, nn.Dropout(0.5)).eval(), (X,)))
    assert "exported in eval" not in cm.explain(bound)


def test_unflattened_modules_warn_of_reuse_across_their_submodules():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.fc = inner, nn.Linear(4, 4)

        def forward(self, x):
            h = self.fc(x)
            return h + self.inner(h)

    unflattened = torch.export.unflatten(torch.export.export(Outer(nn.Sequential(nn.Dropout(0.5))).eval(), (X,)))
    with pytest.warns(cm.ModeWarning, match="have several users"):
        cm.bind(unflattened)


def test_branches_of_cond_are_kept_apart_too():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = x * 2
            return torch.cond(x.sum() > 0, lambda h: h + self.drop(h), lambda h: h * 1, (h,))

    model = Branch()
    module = cm.export(model, (X.abs(),))
    for mode in (True, False):
        same_outputs(model.train(mode), module.train(mode), X.abs())
