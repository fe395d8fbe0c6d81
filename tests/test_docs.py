"""The code of README.md and docs/, run in order, one namespace per file; a ``text`` block is what the code prints.

And the pages beside the guides: limits, API.
"""

import contextlib
import io
import linecache
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes import _compat, messages
from compile_modes.messages.page import markdown

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = sorted((ROOT / "docs").glob("*.md"))
# What upstream.md shows has to fail: tests/test_upstream.py.
FILES = [p for p in (ROOT / "README.md", *DOCS) if p.stem != "upstream" and "```python" in p.read_text()]
LIMITS = (ROOT / "docs" / "limits.md").read_text()
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.bn(x))


class Net(nn.Module):
    """What the README calls ``net``."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = Layer(), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer2(self.layer1(x))


def run(path, *, slow):
    """Runs the blocks of a file; those marked ``slow``, which need Inductor, only if asked for."""
    if path.name == "qat.md":
        pytest.importorskip("torchao.quantization.pt2e")
        if slow and torch.__version__ < "2.12":
            pytest.skip("torchao's quantizer annotates nothing on torch 2.11, so that there is nothing to convert")
    if path.name == "trainers.md" and slow:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    if path.name == "runtimes.md" and slow:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    text = path.read_text()
    namespace = {"__name__": "__main__", "net": Net(), "x": torch.randn(6, 4)} if path.name == "README.md" else {}
    namespace.setdefault("__name__", path.stem)
    printed, count = "", 0
    for match in FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        if language == "text":
            assert lines(printed) == lines(match["body"]), f"{path.name} shows another output"
        elif language == "python" and (slow or "slow" not in marks):
            count += 1
            name = f"<{path.name}:{text.count(chr(10), 0, match.start('body')) + 1}>"
            linecache.cache[name] = (len(match["body"]), None, match["body"].splitlines(keepends=True), name)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(match["body"], name, "exec"), namespace)
            printed = output.getvalue()
    assert count


def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_code_of(path, no_inductor):
    run(path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_code_through_inductor_of(path, monkeypatch):
    handed_over = []
    inductor = _compat.inductor
    monkeypatch.setattr(_compat, "inductor", lambda *args: handed_over.append(args) or inductor(*args))
    run(path, slow=True)
    assert handed_over or "pt2e_modes" not in "".join(m["body"] for m in FENCE.finditer(path.read_text()))


def test_every_guide_is_in_the_index_and_links_lead_somewhere():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in DOCS:
        assert path.name == "README.md" or f"({path.name})" in index
        for target in LINK.findall(path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    assert "docs/README.md" in (ROOT / "README.md").read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert set(re.findall(r"[\w-]+\.md", navigation)) == {path.name for path in DOCS}


def test_every_public_name_is_on_its_page():
    entries = re.findall(r"^::: compile_modes\.(.+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    # By its whole path, what has the name of its room: readers of sources take the short one for that.
    names = {"package": "package.packaging.package", "sample": "sampling.sample.sample"}
    trainers = [
        f"integrations.{name}.CompileCallback" for name in ("transformers", "lightning")
    ]  # import their library
    phases = ["integrations.phases.Phases", "integrations.phases.Phase"]
    others = ["backend.pt2e_modes", *trainers, *phases]
    assert sorted(entries) == sorted([*(names.get(name, name) for name in cm.__all__), *others])
    assert all(getattr(cm, name).__doc__ for name in cm.__all__)


def test_each_limit_says_who_enforces_it_and_what_to_do():
    limits = re.split(r"^### ", LIMITS.partition("## The limits")[2], flags=re.MULTILINE)[1:]
    assert [int(limit.partition(".")[0]) for limit in limits] == list(range(1, len(limits) + 1))
    for limit in limits:
        enforced = re.findall(r"^- Enforced: (.*)", limit, re.MULTILINE)
        assert len(enforced) == len(re.findall("^- To do: .", limit, re.MULTILINE)) == 1, limit
        assert re.match("refused|warned|listed|silent|torch", enforced[0]), limit
        kinds = {messages.CATALOGUE[code].kind for code in re.findall(r"\[(CM\d+)\]", enforced[0])}
        assert ("warned" in enforced[0]) is ("ModeWarning" in kinds), limit
        assert ("refused" in enforced[0]) is any(kind.endswith("Error") for kind in kinds), limit


def test_the_page_of_messages_is_current():
    says = "run: python -m compile_modes.messages > docs/messages.md"
    assert (ROOT / "docs" / "messages.md").read_text() == markdown(), says
