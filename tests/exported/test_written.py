"""Buffers that one train export writes: whether eager writes them in eval, nobody can tell, so bind says which."""

import io
import warnings

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.exported.programs import baked
from exported.test_effects import SURROUNDINGS, Book
from nets import ConvNet, UserCounter
from oracle import same_state

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
WRITING = [name for name in SURROUNDINGS if name != "draw"]


class Chain(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


def export(*modules, training=True):
    return torch.export.export(Chain(*modules).train(training), (X,))


def said(exported, **options):
    """The codes and texts of what bind warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", cm.ModeWarning)
        cm.bind(exported, **options)
    return [str(w.message).splitlines()[0] for w in caught if isinstance(w.message, cm.ModeWarning)]


@pytest.mark.parametrize("surroundings", WRITING)
def test_are_named(surroundings):
    (text,) = said(export(Book(surroundings), nn.Dropout(0.2)))
    assert text.startswith("CM240: '0.book' are written in both modes")


def assigned(q):
    q[0] = 1.0


BEHIND = {
    "index": assigned,
    "view": lambda q: q.view(-1).mul_(0.5),
    "unbind": lambda q: q.unbind(0)[1].add_(1),
    "foreach": lambda q: torch._foreach_mul_([q], 0.5),
}


@pytest.mark.parametrize("write", BEHIND.values(), ids=BEHIND)
def test_written_through_views_and_in_lists_too(write):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("q", torch.ones(2, 4))

        def forward(self, x):
            if self.training:
                write(self.q)
            return x * 2

    (text,) = said(export(Writes(), nn.Dropout(0.2)))
    assert text.startswith("CM240: '0.q' are written in both modes")


def test_for_they_are_written_in_eval_too():
    with pytest.warns(cm.ModeWarning, match="CM240"):
        module = cm.bind(export(Book("no_grad"), nn.Dropout(0.2)))
    module.eval()(X)
    assert not module.get_buffer("0.book").eq(1).any()


@pytest.mark.parametrize("keep", ["0.book", "0", "*.book"])
@pytest.mark.parametrize("training", [True, False])
def test_that_are_meant_to_be_are_kept_by_name(keep, training):
    program = export(Book("no_grad", mode=training), nn.Dropout(0.2), training=training)
    assert said(program, keep=[keep]) == []
    assert [site.bound for site in cm.sites(cm.bind(program, keep=[keep]))] == [True]


def test_other_names_are_an_error():
    with pytest.raises(cm.OverrideError, match=r"^CM109: the pattern '0.box' matches no .*\n.*\n.*'0.book'"):
        cm.bind(export(Book("no_grad"), nn.Dropout(0.2)), keep=["0.box"])


def test_counters_of_a_models_own_are_among_them():
    assert said(torch.export.export(UserCounter(), (X,)))[0].startswith("CM240: 'steps' are written")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2)),
        lambda: nn.Sequential(nn.InstanceNorm1d(5, track_running_stats=True), nn.Dropout(0.2)),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.2)),
    ],
    ids=["batch-norm", "instance-norm", "spectral-norm"],
)
def test_those_of_sites_are_not(build):
    x = X[None] if isinstance(build()[0], nn.InstanceNorm1d) else X
    assert said(torch.export.export(build(), (x,))) == []


def test_an_eval_export_says_what_eval_does():
    assert said(export(Book("no_grad", mode=False), nn.Dropout(0.2), training=False)) == []


def test_decomposed_programs_say_so_too():
    texts = said(export(Book("no_grad"), nn.Dropout(0.2)).run_decompositions())
    assert any(text.startswith("CM240: '0.book' are written in both modes") for text in texts)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)], ids=["affine", "plain"])
def test_statistics_of_decomposed_norms_are_theirs(norm):
    program = export(nn.Linear(4, 4), norm, nn.Dropout(0.2)).run_decompositions()
    assert not [text for text in said(program) if text.startswith("CM240")]


def test_nothing_is_said_again_of_what_is_bound():
    with pytest.warns(cm.ModeWarning, match="CM240"):
        module = cm.bind(export(Book("no_grad"), nn.Dropout(0.2)))
    assert said(module) == []


def test_files_know_what_was_said():
    module, file = cm.bind(export(Book("no_grad"), nn.Dropout(0.2)), keep=["0.book"]), io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    same_state(module, cm.load(file), 0.0)


def test_what_both_exports_tell_is_not_asked():
    model = nn.Sequential(Book("no_grad"), nn.Dropout(0.2))
    assert said(cm.export(model, (X,))) == []
    assert said(torch.export.export(ConvNet(), (torch.randn(2, 3, 8, 8),))) == []


def test_baking_for_eval_asks_too():
    program = export(Book("no_grad"), nn.Dropout(0.2))
    with pytest.raises(cm.BindError, match=r"(?s)^CM211: .*CM240: '0.book' are written in both modes"):
        baked(program, False)
    for result in (baked(program, True), baked(cm.bind(program, keep=["0.book"]), False)):
        assert isinstance(result, torch.export.ExportedProgram)
