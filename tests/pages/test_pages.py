"""What becomes of data before a browser sees it, and of files."""

import html.parser
import io
import json
import os

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes import messages, pages
from compile_modes.graph.explain import survey
from compile_modes.pages.tree import drawn, tree
from nets import TOKENS, VECTORS, Attention, Small

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Balance(html.parser.HTMLParser):
    """Checks that elements end in the order in which they begin, and that no id is given twice."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        for name, value in attributes:
            if name == "id":
                assert value not in self.ids
                self.ids.add(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def program(model=None, x=VECTORS):
    return torch.export.export(model or Small(4), (x,))


def test_pages_are_well_formed_and_the_same_each_time(tmp_path):
    for number in range(2):
        cm.explain(program(Attention().eval(), TOKENS), html=tmp_path / f"{number}.html")
    first, second = ((tmp_path / f"{number}.html").read_bytes() for number in range(2))
    assert first == second
    one = program()
    for text in (first.decode(), cm.diff(one, cm.bind(one)).html(), cm.explain(one)._repr_html_()):
        parser = Balance()
        parser.feed(text)
        assert parser.open == []
    assert "CM713" in first.decode()
    assert messages.CATALOGUE["CM713"].kind in first.decode()


def test_the_page_shows_what_the_data_says(tmp_path):
    module = cm.bind(program())
    text = cm.explain(module, html=tmp_path / "modes.html")
    assert isinstance(text, str)
    assert text == cm.explain(module)
    assert text.data == survey(module)
    json.dumps(text.data)
    page = (tmp_path / "modes.html").read_text("utf-8")
    for said in ("bn", "drop", "momentum=0.03, eps=0.001", "p=0.25", "<b>2</b> train", "<b>0</b> eval"):
        assert said in page


def test_chains_of_modules_are_one_branch():
    root = tree([("a.b.c", 1), ("a.b.c.d.e", 2), ("x", 3), ("", 4)])
    assert root.items == [4]
    assert {name: child.name for name, child in root.children.items()} == {"a": "a.b.c", "x": "x"}
    (below,) = root.children["a"].children.values()
    assert (below.name, below.path, below.items) == ("d.e", "a.b.c.d.e", [2])
    assert root.below() == [4, 1, 2, 3]
    deep = tree([(".".join("a" * depth), depth) for depth in range(1, 1000)])
    assert deep.below() == list(range(1, 1000))
    assert drawn(deep, lambda one, path, name: f"<li>{one}</li>", lambda below: "", bool).count("<details") < 100


def test_a_page_takes_the_place_of_a_file_or_goes_into_a_stream(tmp_path):
    path = tmp_path / "modes.html"
    path.write_text("before")
    stream = io.BytesIO()
    for target in (path, str(path), stream):
        cm.explain(program(), html=target)
    assert path.read_bytes() == stream.getvalue()
    assert os.listdir(tmp_path) == ["modes.html"]


@pytest.mark.parametrize("given", [3, "", True, io.StringIO(), ["modes.html"]], ids=lambda given: type(given).__name__)
def test_what_is_no_file_is_refused(given):
    with pytest.raises(cm.OptionError, match=r"CM917: html=.* is no file to write to"):
        cm.explain(program(), html=given)


def test_a_file_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(cm.ArchiveError, match="CM503"):
        cm.explain(program(), html=tmp_path / "none" / "modes.html")
    with pytest.raises(cm.ArchiveError, match="directory"):
        cm.explain(program(), html=tmp_path / "folder")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(cm.ArchiveError, match="No space left"):
        cm.explain(program(), html=tmp_path / "modes.html")
    assert os.listdir(tmp_path) == ["folder"]


def test_names_that_no_encoding_has_are_written(tmp_path):
    pages.write(pages.document("half \ud800 a pair", ""), tmp_path / "odd.html")
    assert "half \\ud800 a pair" in (tmp_path / "odd.html").read_text("utf-8")


def test_reports_are_shown_in_notebooks_with_what_their_codes_mean():
    model = Small(4)
    shown = cm.verify(cm.bind(program(model)), model, VECTORS, vectors=0)._repr_html_()
    assert "<pre>equal: 2 mode vectors" in shown
    refused = cm.set_mode(program(Attention().eval(), TOKENS).module(), True)
    shown = refused._repr_html_()
    assert '<a href="#CM713">CM713</a>' in shown
    assert "<b>What to do:</b> export in train mode" in shown
    assert str(refused).splitlines()[0] in shown


def test_hostile_names_of_modules_are_escaped(tmp_path):
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Dropout(0.5))
    one = program(model)
    cm.explain(one, html=tmp_path / "modes.html")
    for text in (
        (tmp_path / "modes.html").read_text("utf-8"),
        cm.explain(one)._repr_html_(),
        cm.diff(one, cm.bind(one)).html(),
    ):
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
