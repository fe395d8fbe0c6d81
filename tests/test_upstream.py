"""Faults of torch and others, each as ``docs/upstream.md`` shows it: one that is gone fails its test here."""

import builtins
import re
from pathlib import Path

import pytest
import torch
from torch._export.verifier import SpecViolationError

DOCUMENT = (Path(__file__).parents[1] / "docs" / "upstream.md").read_text()
PRELUDE = re.search(r"```python prelude\n(.*?)```", DOCUMENT, re.S)[1]
SECTION = re.compile(r"^### (.*?)\n(.*?)```python( slow)?\n(.*?)```", re.M | re.S)
SEEN = re.compile(r"Seen: (2\.\d+)(?:, raises (\w+))?(?:, needs (\w+))?\. Our way")
RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))


def sections():
    for title, text, slow, code in SECTION.findall(DOCUMENT):
        seen = SEEN.search(text.replace("\n", " "))
        assert seen, f"{title} doesn't say where it was seen"
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(code, *seen.groups(), id=re.sub(r"\W+", "-", title).strip("-"), marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "first", "raised", "needed"), sections())
def test_a_fault_is_still_there(code, first, raised, needed, request):
    if needed:
        pytest.importorskip(needed)
    if tuple(map(int, first.split("."))) > RELEASE:
        pytest.skip(f"seen on torch {first} and newer")
    kind = SpecViolationError if raised == "SpecViolationError" else getattr(builtins, raised or "AssertionError")
    request.applymarker(pytest.mark.xfail(raises=kind, strict=True, reason="upstream"))
    exec(compile(PRELUDE + code, request.node.name, "exec"), {"__name__": "upstream"})


def test_every_section_is_found():
    assert len(list(sections())) == DOCUMENT.count("\n### ") > 20
