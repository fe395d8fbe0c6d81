"""One graph for what Python decides by ``training``, module by module."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import compile_modes as cm
from compile_modes.graph.calls import FOLDED
from compile_modes.graph.dual import DualModule
from exported.random_writers import Skip
from exported.vectors import agree_in_modes, random_modes, set_modes
from graphs import graphs_compiled
from oracle import agrees, same_outputs

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


class Codebook(nn.Module):
    """As vector-quantize-pytorch's: training alone moves the code book, and counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("book", torch.linspace(-1, 1, 24).view(6, 4))
        self.register_buffer("n", torch.zeros(()))

    def forward(self, h):
        q = F.embedding(torch.cdist(h, self.book).argmin(-1), self.book)
        if self.training:
            with torch.no_grad():
                self.book.mul_(0.9).add_(q.mean(0) * 0.1)
            self.n += 1
        return h + (q - h).detach()


class Jitter(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, h):
        return self.fc(h * torch.empty_like(h).uniform_(0.9, 1.1) if self.training else h)


class Noise(nn.Module):
    """Nothing but noise, so that two in a row share no op between them."""

    def forward(self, h):
        return h + 0.1 * torch.randn_like(h) if self.training else h


class Gumbel(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, h):
        h = self.bn(self.fc(h))
        return F.gumbel_softmax(h) if self.training else F.one_hot(h.argmax(-1), 4).to(h.dtype)


class Momentum(nn.Module):
    """As MoCo: a momentum twin, and a queue with a pointer, under no_grad methods."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update(self, keys):
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.mul_(0.99).add_(q, alpha=0.01)
        places = (self.pointer + torch.arange(8)) % 16
        self.queue.index_copy_(1, places, keys.T)
        self.pointer.copy_((self.pointer + 8) % 16)

    def forward(self, h):
        q = F.normalize(self.query(h), dim=1)
        logits = q @ self.queue.clone()
        if self.training:
            with torch.no_grad():
                keys = F.normalize(self.key(h), dim=1)
            self.update(keys)
        return logits[:, :4]


class Centre(nn.Module):
    """As DINO's centre: an assigned buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, 4))

    @torch.no_grad()
    def update(self, h):
        self.centre = self.centre * 0.9 + h.mean(0, keepdim=True) * 0.1

    def forward(self, h):
        out = F.softmax((h - self.centre) / 0.5, dim=-1)
        if self.training:
            self.update(h)
        return out


class Inside(nn.Module):
    """Calls its child in a no_grad region, where the child decides."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, h):
        with torch.no_grad():
            y = self.child(h)
        return h + y


class Passes(nn.Module):
    """Hands its own mode to a function."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()
        self.drop = nn.Dropout(0.2)

    def forward(self, h):
        if not self.training:
            h = h.tanh()
        return self.drop(F.dropout(h, 0.3, self.training))


class Net(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.inp, self.parts, self.drop = nn.Linear(4, 4), nn.Sequential(*parts), nn.Dropout(0.3)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.drop(self.parts(self.inp(x))))


MODELS = [
    pytest.param(lambda: [Codebook()], {"parts.0"}, id="codebook"),
    pytest.param(lambda: [Jitter()], {"parts.0"}, id="jitter"),
    pytest.param(lambda: [Gumbel()], {"parts.0"}, id="gumbel"),
    pytest.param(lambda: [Noise(), Noise(), Noise()], {"parts.0", "parts.1", "parts.2"}, id="noise-in-a-row"),
    pytest.param(lambda: [Skip(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))], {"parts.0"}, id="skip"),
    pytest.param(
        lambda: [Skip(Codebook(), Noise(), nn.Dropout(0.2))],
        {"parts.0", "parts.0.child.0", "parts.0.child.1"},
        id="nested",
    ),
    pytest.param(lambda: [Inside(Codebook())], {"parts.0.child"}, id="in-a-region"),
    pytest.param(lambda: [Momentum()], {"parts.0"}, id="momentum"),
    pytest.param(lambda: [Centre()], {"parts.0"}, id="centre"),
    pytest.param(lambda: [Passes(), nn.BatchNorm1d(4)], {"parts.0"}, id="passes-its-mode"),
    pytest.param(
        lambda: [Codebook(), Jitter(), Gumbel(), Skip(nn.Linear(4, 4), nn.Dropout(0.2)), nn.BatchNorm1d(4)],
        {"parts.0", "parts.1", "parts.2", "parts.3"},
        id="all",
    ),
]


def both(parts):
    reference, model = Net(*parts()), Net(*parts())
    model.load_state_dict(reference.state_dict())
    return reference, cm.export(model, (X,))


@pytest.mark.parametrize(("parts", "deciders"), MODELS)
@pytest.mark.every(4)
def test_modules_decide_for_themselves(parts, deciders):
    reference, module = both(parts)
    assert isinstance(module, fx.GraphModule)
    assert {site.owner for site in cm.sites(module) if site.op.family in ("switch", "noise")} == deciders
    assert agree_in_modes(reference, module, X, random_modes(reference, 12)) == 0


@pytest.mark.parametrize(("parts", "deciders"), MODELS)
@pytest.mark.every(6)
def test_baked_and_exported_again_in_any_modes(parts, deciders):
    reference, module = both(parts)
    for modes in random_modes(reference, 3):
        set_modes(reference, modes)
        set_modes(module, modes)
        baked = cm.bake(copy.deepcopy(module))
        assert not [node for m in baked.modules() if isinstance(m, fx.GraphModule) for node in m.graph.nodes if
                    node.target in FOLDED]  # fmt: skip
        start = copy.deepcopy(reference.state_dict())
        for form in (baked, torch.export.export(copy.deepcopy(module), (X,)).module()):
            reference.load_state_dict(start)
            form.load_state_dict(start)
            same_outputs(reference, form, X)
            for name, value in reference.state_dict().items():
                assert torch.equal(value, form.state_dict()[name]), name


@pytest.mark.every(2)
@pytest.mark.parametrize(("parts", "deciders"), [MODELS[0].values, MODELS[1].values, MODELS[3].values])
def test_saved_with_its_switches(parts, deciders):
    reference, module = both(parts)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    loaded = cm.load(file)
    assert {site.owner for site in cm.sites(loaded) if site.op.family in ("switch", "noise")} == deciders
    agree_in_modes(reference, loaded, X, random_modes(reference, 4))


def test_switches_are_explained():
    _, module = both(lambda: [Codebook()])
    line = next(line for line in cm.explain(module).splitlines() if "switch" in line)
    assert "train=7 ops, writes parts.0.book, parts.0.n" in line.replace("'", "") or "writes" in line
    assert "eval=nothing" in line


def test_set_mode_reaches_switches():
    reference, module = both(lambda: [Codebook(), nn.BatchNorm1d(4)])
    report = cm.set_mode(module, True, overrides={"parts.0": "eval"})
    assert {site.op.family: site.training for site in cm.sites(module)}["switch"] is False
    assert any(site.op.family == "switch" for site in report.changed)
    reference.train().parts[0].eval()
    before = module.get_buffer("parts.0.book").clone()
    same_outputs(reference, module, X)
    assert torch.equal(module.get_buffer("parts.0.book"), before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_compiled_each_combination_once():
    reference, module = both(lambda: [Codebook(), Skip(nn.Linear(4, 4), nn.Dropout(0.2))])
    compiled = torch.compile(module, backend="pt2e_modes")
    modes = random_modes(reference, 0)
    modes += [dict(modes[0], **{"parts.0": False}), dict(modes[0], **{"parts.1": False})]
    for _ in range(2):
        agree_in_modes(reference, module, X, modes, call=compiled, tolerance=1e-5)
    assert graphs_compiled() == 4


@pytest.mark.every(2)
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("inner", [False, True], ids=["outer", "in-a-branch"])
def test_options_that_would_have_to_reach_a_switch_say_so(inner):
    """Options reach the dropout of Passes itself, but of its switch Dynamo has traced one branch."""
    _, module = both(lambda: [Skip(Passes(), nn.Dropout(0.1)) if inner else Passes()])
    name = "parts.0.child.0" if inner else "parts.0"
    compiled = torch.compile(module.train(), backend="pt2e_modes", options={"overrides": {name: "eval"}})
    with pytest.warns(cm.ModeWarning, match=f"'{name}'.*read their training flag"):
        compiled(X)


class Either(nn.Module):
    """Noise if it trains or its child does: no single module decides."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, h):
        h = self.child(h)
        return h + 0.1 * torch.randn_like(h) if self.training or self.child.training else h


class Heads(nn.Module):
    """Other outputs in train, and a codebook of its own mind."""

    def __init__(self):
        super().__init__()
        self.book, self.out, self.aux = Codebook(), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.book(x)
        return (self.out(h), self.aux(h)) if self.training else self.out(h)


@pytest.mark.slow
def test_two_programs_have_switches_inside(tmp_path):
    reference, mine = Heads(), Heads()
    mine.load_state_dict(reference.state_dict())
    module = cm.export(mine, (X,))
    assert isinstance(module, DualModule)
    assert [site.owner for site in cm.sites(module) if site.op.family == "switch"] == ["book", "book"]
    cm.save(module, tmp_path / "model.pt2")
    for again in (module, copy.deepcopy(module), cm.load(tmp_path / "model.pt2")):
        assert cm.verify(again, reference, X, vectors=12).equal
    again = cm.load(tmp_path / "model.pt2").train()
    again.book.eval()
    baked = cm.bake(again.program(True))
    reference.train()
    reference.book.eval()
    reference.load_state_dict(again.state_dict())
    for ours, eager in zip(baked(X), reference(X), strict=True):
        assert torch.equal(ours, eager)
    assert torch.equal(baked.get_buffer("book.book"), reference.book.book)


def test_what_cannot_be_told_apart_warns_when_a_child_is_flipped():
    child = "parts.0"
    reference, mine = Net(Either()), Net(Either())
    mine.load_state_dict(reference.state_dict())
    module = cm.export(mine, (X,))
    assert isinstance(module, DualModule)
    agrees(reference, module, inputs=[X], tolerance=0.0)
    module.train()
    with pytest.warns(cm.ModeWarning, match=f"'{child}.*follows the root"):
        module.get_submodule(child).eval()
    module.get_submodule(child).train()
    with pytest.warns(cm.ModeWarning, match="follows the root"):
        copy.deepcopy(module).get_submodule(child).eval()


def test_without_probing_it_is_guessed_and_said():
    reference, model = Net(Codebook()), Net(Codebook())
    model.load_state_dict(reference.state_dict())
    with pytest.warns(cm.ModeWarning, match="'parts.0' is taken to follow"):
        module = cm.export(model, (X,), probe=False)
    agrees(reference, module, inputs=[X], tolerance=0.0)


@pytest.mark.every(3)
@pytest.mark.parametrize("parts", [m.values[0] for m in MODELS if m.id not in ("centre", "jitter")])
def test_two_programs_are_bound_together(parts):
    reference, model = Net(*parts()), Net(*parts())
    model.load_state_dict(reference.state_dict())
    train = torch.export.export(model.train(), (X,))
    evaluation = torch.export.export(copy.deepcopy(model).eval(), (X,))
    with pytest.warns(cm.ModeWarning, match="guess"):
        module = cm.bind(train, evaluation=evaluation)
    agrees(reference, module, inputs=[X], tolerance=0.0)


def test_programs_with_other_weights_are_refused_by_name():
    train = torch.export.export(Net(Codebook()).train(), (X,))
    other = Net(Codebook())
    other.load_state_dict(dict(train.state_dict))
    with torch.no_grad():
        other.out.bias.add_(1)
    with pytest.raises(cm.BindError, match=r"other values(.|\n)*out\.bias"):
        cm.bind(train, evaluation=torch.export.export(other.eval(), (X,)))
    with pytest.raises(cm.BindError, match="no ExportedProgram"):
        cm.bind(train, evaluation=other)


def test_two_programs_the_wrong_way_round_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    train, evaluation = (torch.export.export(model.train(mode), (X,)) for mode in (True, False))
    with pytest.raises(cm.BindError, match="CM326: the program for evaluation has ops in train mode"):
        cm.bind(evaluation, evaluation=train)
    with pytest.raises(cm.BindError, match="CM327: both programs are the same one"):
        cm.bind(train, evaluation=train)
