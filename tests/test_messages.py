"""The catalogue is complete: whatever the package says stands there, is used, and names a cause and a remedy."""

import ast
import itertools
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import compile_modes as cm
from compile_modes import errors, messages
from compile_modes.messages.page import markdown
from nets import IMAGE, ConvNet

PACKAGE = Path(cm.__file__).parent
ROOM = PACKAGE / "messages"
TYPES = {name for name, kind in vars(errors).items() if isinstance(kind, type) and kind.__module__ == errors.__name__}
ENTRIES = {name: value for name, value in vars(messages).items() if isinstance(value, messages.Message)}
METHODS = {"error", "warning", "warn", "warn_once", "reason"}


def trees():
    """Each file of the package outside of the catalogue."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent != ROOM and path != PACKAGE / "errors.py":
            yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def named(node):
    """The dotted name that an expression is; empty if it is none."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls():
    """All calls of the package outside of the catalogue, with the name of what is called."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{path}:{node.lineno}", named(node.func), node


def test_nothing_is_said_outside_of_the_catalogue():
    made = {f"errors.{name}" for name in TYPES} | {f"cm.{name}" for name in TYPES} | TYPES | {"warnings.warn"}
    assert not [place for place, name, _ in calls() if name in made]
    raised = [named(n.exc) for _, tree in trees() for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
    assert not TYPES & {name.rpartition(".")[2] for name in raised}, "a class is raised as it is, without a text"


def test_types_of_errors_are_made_in_one_file():
    classes = [(path, n) for path, tree in trees() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert not [(path, n.name) for path, n in classes if TYPES & {named(base).rpartition(".")[2] for base in n.bases}]


def test_every_entry_is_used():
    said = {n.attr for _, tree in trees() for n in ast.walk(tree) if named(n).startswith("messages.")}
    assert ENTRIES.keys() - said == set()


def test_calls_give_the_fields_that_their_entry_takes():
    found = 0
    for place, name, call in calls():
        room, _, rest = name.partition(".")
        entry, _, method = rest.partition(".")
        if room == "messages" and entry in ENTRIES:
            found += 1
            assert method in METHODS, place
            assert hasattr(ENTRIES[entry], method), f"{place}: {entry} has no {method}"
            given = {keyword.arg for keyword in call.keywords}
            assert None in given or given == ENTRIES[entry].fields, place  # ** shows when it is run
    assert found >= len(ENTRIES) - 5  # a few are taken by other names


def test_entries_are_the_catalogue_in_order_of_codes():
    assert sorted(entry.code for entry in ENTRIES.values()) == sorted(messages.CATALOGUE)
    spans = []
    for path in ROOM.glob("*.py"):
        codes = re.findall(r'^[A-Z_]+ = \w+\(\s*"(CM\d+)"', path.read_text(), re.MULTILINE)
        assert codes == sorted(codes), path.name
        assert len({code[:3] for code in codes}) <= 1, f"{path.name} holds several groups"
        spans += [(codes[0], codes[-1])] if codes else []
    assert len({first[:3] for first, _ in spans}) == 10
    for (_, last), (first, _) in itertools.pairwise(sorted(spans)):
        assert last < first, "two files hold codes of one range"


@pytest.mark.parametrize("code", sorted(messages.CATALOGUE))
def test_entries_name_cause_and_remedy(code):
    entry = messages.CATALOGUE[code]
    assert entry.cause
    assert entry.remedy
    fields = dict.fromkeys(entry.fields, "X")
    cause, where, remedy = entry.filled(fields)
    assert not re.search(r"\{[a-z_]+(![a-z])?\}", cause + where + remedy), "a field is not filled in"
    if isinstance(entry, messages.Error):
        error = entry.error(**fields)
        assert (error.code, error.cause, error.where, error.remedy) == (code, cause, where, remedy)
        assert str(error).startswith(f"{code}: {cause}")
        assert f"what to do: {remedy}" in str(error)
    elif isinstance(entry, messages.Warn):
        warning = entry.warning(**fields)
        assert warning.code == code
        assert str(warning).startswith(f"{code}: {cause}")
        assert f"what to do: {remedy}" in str(warning)
    else:
        assert messages.parted(entry.reason(**fields)) == (code, cause)


def test_a_field_too_few_or_too_many_is_an_error():
    with pytest.raises(TypeError, match=r"CM104 takes the fields \['mode', 'pattern', 'where'\], not \['mode'\]"):
        messages.NOT_A_MODE.error(mode="on")
    with pytest.raises(TypeError, match=r"CM901 takes the fields \[\], not \['kind'\]"):
        messages.NO_RICH.error(kind="table")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("CM901", "again", "so"), "two messages have the code CM901"),
        (("CM12", "short", "so"), "no code"),
        (("CM999", "nothing to do", ""), "lacks a cause or a remedy"),
    ],
)
def test_entries_that_can_not_be(given, says):
    before = dict(messages.CATALOGUE)
    with pytest.raises(ValueError, match=says):
        messages.Error(*given, raised=cm.BindError)
    assert before == messages.CATALOGUE


def test_errors_keep_their_code_when_their_place_is_found_out(tmp_path):
    (tmp_path / "empty.pt2").touch()
    with pytest.raises(cm.ArchiveError, match=r"^CM507: the file is empty\n  where: .*empty.pt2\n") as error:
        cm.load(tmp_path / "empty.pt2")
    assert error.value.code == messages.EMPTY.code


def two_warnings():
    messages.UNCOUNTED.warn(owners="'bn'")
    messages.UNBOUND.warn(count=2)


def test_warnings_are_chosen_by_code():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="CM232", category=cm.ModeWarning)
        two_warnings()
    assert [warning.message.code for warning in caught] == ["CM410"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="CM232", category=cm.ModeWarning)
        two_warnings()
    assert [warning.message.code for warning in caught] == ["CM232"]


def test_warnings_are_said_once_of_the_same_things():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for about in (1, 1, 2):
            messages.NOT_COMPILED.warn_once(about, modules="'drop'")
        messages.NOT_COMPILED.warn_once(1, modules="'other'")
    assert len(caught) == 3


def test_warnings_stand_at_the_line_of_the_user():
    program = torch.export.export(Masked().eval(), (torch.randn(2, 4),))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cm.bind(program)
    assert [(w.filename, w.message.code) for w in caught] == [(__file__, "CM237")]
    assert "cm.bind(program)" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_warnings_from_within_a_compilation_stand_at_the_line_of_the_user(no_inductor):
    module = torch.export.export(ConvNet().eval(), (IMAGE,)).module()
    compiled = torch.compile(module, backend="pt2e_modes")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(IMAGE)
    own = [w for w in caught if isinstance(w.message, cm.ModeWarning)]
    assert [(w.filename, w.message.code) for w in own] == [(__file__, "CM410")]
    assert "compiled(IMAGE)" in Path(__file__).read_text().splitlines()[own[0].lineno - 1]


class Masked(torch.nn.Module):
    """A module of which an eval export holds nothing, and a layer."""

    def __init__(self):
        super().__init__()
        self.mask, self.layer = Mask(), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.mask(self.layer(x))


class Mask(torch.nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x) if self.training else x


def test_explain_shows_the_code_of_each_reason():
    program = torch.export.export(torch.nn.MultiheadAttention(4, 2, dropout=0.5).eval(), (torch.randn(3, 1, 4),) * 3)
    assert "not to train (CM704): no dropout on the attention weights" in cm.explain(program)


def test_the_page_has_a_section_for_every_code(capsys):
    page = markdown()
    assert re.findall(r"^### (CM\d+)$", page, re.MULTILINE) == sorted(messages.CATALOGUE)
    runpy.run_module("compile_modes.messages", run_name="__main__")
    assert capsys.readouterr().out == page
