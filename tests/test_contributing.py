"""What CONTRIBUTING.md promises: the tests it names exist, the map is whole, and forgotten steps are found."""

import ast
import re
from pathlib import Path

import compile_modes
from compile_modes.backend import options
from compile_modes.backend.entry import pt2e_modes
from compile_modes.forms import lower
from compile_modes.graph.ops import TABLE

ROOT = Path(__file__).parents[1]
PACKAGE = Path(compile_modes.__file__).parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
VERSION = r"\d+\.\d+\.\d+"


def test_every_test_that_is_named_exists():
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", GUIDE))
    assert len(named) > 10
    assert named <= found


def test_every_folder_is_on_the_map():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    rows = GUIDE.partition("## The map")[2].partition("\n### ")[0].splitlines()
    named = [name for row in rows if row.startswith("| ") for name in re.findall(r"`(\w+)/?`", row.split("|")[1])]
    assert folders <= set(named)
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() for name in named)


def test_every_form_is_applied():
    source = Path(lower.__file__).read_text()
    forms = {path.stem for path in (PACKAGE / "forms").glob("*.py")} - {"__init__", "lower"}
    assert {name for name in forms if f"from compile_modes.forms.{name} import" in source} == forms


def test_options_of_the_backend_are_documented():
    assert len(options.OWN_OPTIONS) >= 4
    for name in options.OWN_OPTIONS:
        assert f"``{name}``" in pt2e_modes.__doc__, name


def test_every_family_of_ops_is_in_the_table_of_what_switches():
    table = (ROOT / "docs/limits.md").read_text().partition("## The limits")[0].lower()
    for family in {row.family for row in TABLE.values()}:
        assert family.replace("_", " ") in table, family


def test_releases_that_were_checked_are_named_alike():
    listed = rf"hecked on torch ((?:{VERSION}(?:, | and )?)+)"
    texts = [(ROOT / "README.md").read_text(), (PACKAGE / "_compat/__init__.py").read_text()]
    releases, known = (re.findall(VERSION, re.search(listed, text)[1]) for text in texts)
    assert releases == known
    newest = re.search(r'newest = \["torch>=(\d+\.\d+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    assert releases[-1].startswith(f"{newest}.")
