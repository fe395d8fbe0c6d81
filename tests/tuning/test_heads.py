import copy
import io

import pytest
import torch
from torch import nn

import compile_modes as cm
from tuning.twins import BATCH, Tuned, X, bound, program, steps

HEADS = {
    "linear": lambda: nn.Linear(6, 3),
    "with-modes": lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=0.2), nn.Dropout(0.4), nn.Linear(6, 7)),
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.TransformerEncoderLayer(3, 1, 5, 0.3), nn.Flatten()),
    "constants": lambda: Scaled(),
    "recurrent": lambda: Last(),
}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)
        self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.fc(x) * self.scale + torch.tensor([1.0, 2.0])


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (2, 3)))[0][:, -1]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("train", [True, False], ids=["train-export", "eval-export"])
@pytest.mark.every(5)
def test_a_new_head_trains_as_in_eager(head, train):
    model, new = Tuned(), HEADS[head]()
    module = bound(model, train=train, dynamic_shapes=BATCH)
    assert cm.replace_head(module, "head", copy.deepcopy(new)) is module
    model.head = new
    assert module.state_dict().keys() == model.state_dict().keys()
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    loaded = cm.load(file)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    again = cm.bind(torch.export.export(copy.deepcopy(module).train(), (X,), dynamic_shapes=BATCH))
    assert steps([model, module, loaded, copy.deepcopy(module), again], torch.cat([X, X]), 8) < 1e-5


def test_a_new_head_of_both_exports(no_inductor):
    model, new = Tuned(), HEADS["with-modes"]()
    module = cm.export(copy.deepcopy(model), (X,))
    cm.replace_head(module, "head", copy.deepcopy(new))
    model.head = new
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert steps([model, cm.load(file), torch.compile(module, backend="pt2e_modes")], X, 8) < 1e-5


@pytest.mark.slow
def test_a_decomposed_program_gets_a_head():
    model, new = Tuned(), HEADS["with-modes"]()
    module = cm.bind(torch.export.export(copy.deepcopy(model), (X,)).run_decompositions())
    cm.replace_head(module, "head", copy.deepcopy(new))
    model.head = new
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert steps([model, module, cm.load(file)], X, 8) < 1e-5


def test_the_module_itself_comes_in_with_its_modes():
    new = HEADS["with-modes"]()
    new[1].eval()
    module = cm.replace_head(bound(Tuned()).eval(), "head", new)
    assert module.head is new
    assert [m.training for m in new.modules()] == [True, True, False, True]
    assert {site.owner: site.training for site in cm.sites(module) if "head" in site.owner} == {
        "head.0": True,
        "head.1": False,
    }


def test_adapters_beside_a_new_head_save_it_too():
    model, new = Tuned(), nn.Linear(6, 3)
    module = cm.replace_head(bound(model), "head", new)
    cm.lora(module, "fc*", r=2, modules_to_save="head")
    assert new.weight.requires_grad
    assert not module.fc1.weight.requires_grad
    assert {"head.weight", "head.bias"} < cm.lora_state_dict(module, modules_to_save="head").keys()
    cm.lora(module, "head", r=2)
    assert module.head.lora_A.weight.shape == (2, 6)


def test_a_part_in_the_middle_is_replaced():
    model = Tuned()
    module = cm.replace_head(bound(model), "drop", nn.Dropout(0.9))
    model.drop = nn.Dropout(0.9)
    assert steps([model, module], X, 8) < 1e-5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x)).softmax(-1)


def test_a_tied_weight_stays_where_it_is_still_used():
    tokens = torch.randint(0, 7, (2, 3))
    model, new = Tied(), nn.Linear(4, 2)
    module = cm.replace_head(bound(model, tokens), "out", copy.deepcopy(new))
    model.out = new
    assert module.state_dict().keys() == model.state_dict().keys()
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert torch.equal(module(tokens), model(tokens))
    assert torch.equal(cm.load(file)(tokens), model(tokens))


def test_globs_that_only_named_the_old_head_are_forgotten():
    program = torch.export.export(Tuned(), (X,))
    module = cm.bind(program, keep=("head.*", "drop"))
    cm.replace_head(module, "head", nn.Linear(6, 3))
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    loaded = cm.load(file)
    assert [(site.owner, site.bound) for site in cm.sites(loaded)] == [("bn", True), ("drop", False)]
    assert torch.equal(loaded.eval().fc1.weight, module.fc1.weight)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.two, self.fc = nn.Linear(4, 4), Two(), nn.Linear(4, 4)
        self.inside = nn.Linear(4, 4)

    def forward(self, x):
        a, b = self.two(self.twice(self.twice(x)))
        with torch.no_grad():
            a = self.inside(a)
        return self.fc(a + b).reshape(-1, 2) + self.fc.weight.sum()


class Two(nn.Module):
    def forward(self, x):
        return x + 1, x * 2


class Decides(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.fc(x)
        return x + y


@pytest.mark.parametrize(
    ("owner", "new", "says"),
    [
        ("twise", nn.Identity, r"CM269: .*'twise'\n.*\n.*did you mean 'twice'"),
        ("", nn.Identity, "CM269"),
        ("twice", nn.Identity, "CM270: .*several times"),
        ("two", nn.Identity, "CM270: .*2 results"),
        ("inside", nn.Identity, "CM270: .*inside a region"),
        ("fc", lambda: nn.Linear(4, 3), "CM270: .*'fc.weight' is also read by sum_1"),
        ("fc", lambda: "head", "CM268: the new head is a str"),
    ],
)
def test_what_can_not_be_replaced(owner, new, says):
    module = bound(Odd(), torch.randn(3, 4))
    code, keys = module.code, list(module.state_dict())
    with pytest.raises(cm.TuningError, match=says):
        cm.replace_head(module, owner, new())
    assert (module.code, list(module.state_dict())) == (code, keys)


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (lambda: nn.Linear(5, 4), r"CM271: Linear can't be called on what 'fc1' gets, \(4, 4\) of torch.float32"),
        (lambda: nn.Linear(4, 5), r"CM275: what follows 'fc1' .*\n.*where: linear_1, behind 'fc1'"),
        (lambda: nn.Linear(4, 6).double(), "CM271"),
        (Decides, "CM272"),
        (Quiet, "CM273"),
        (Pair, "CM274"),
    ],
)
def test_what_does_not_fit(new, says):
    module = cm.bind(program())
    code, keys = module.code, list(module.state_dict())
    with pytest.raises(cm.TuningError, match=says):
        cm.replace_head(module, "fc1", new())
    assert (module.code, list(module.state_dict())) == (code, keys)
