"""What is installed: the version, types, the backend's name, and the script beside ``python -m compile_modes``."""

import configparser
import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import compile_modes as cm
from compile_modes.cli.main import main

ROOT = Path(cm.__file__).parents[1]
VERSIONS = f"compile_modes {cm.__version__}, torch {torch.__version__}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source tree, built from a copy of it: builds leave files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "compile_modes", folder / "source/compile_modes", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(folder / "source")]
    subprocess.run([*command, *isolation()], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def isolation():
    """pip gets the build backend itself, unless one that is new enough is here already."""
    try:
        installed = int(importlib.metadata.version("setuptools").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        installed = 0
    return ["--no-build-isolation"] if installed >= 77 else []


def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel):
    files = [path for path in (ROOT / "compile_modes").rglob("*") if path.suffix in (".py", ".typed", ".css", ".js")]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "compile_modes/py.typed" in names  # without it, type checkers ignore the annotations


def test_the_wheel_says_the_version_of_the_package_and_installs_the_script_and_the_backend(wheel):
    def read(name):
        return wheel.read(f"compile_modes-{cm.__version__}.dist-info/{name}").decode()

    assert f"\nVersion: {cm.__version__}\n" in read("METADATA")
    assert "\nLicense-File: LICENSE\n" in read("METADATA")
    points = configparser.ConfigParser()
    points.optionxform = str  # names as they are written
    points.read_string(read("entry_points.txt"))
    assert {group: dict(points[group]) for group in points.sections()} == {
        "console_scripts": {"compile-modes": "compile_modes.cli.main:main"},
        "torch_dynamo_backends": {"pt2e_modes": "compile_modes.backend.entry:pt2e_modes"},
    }


def test_the_changelog_lists_this_version_unless_nothing_was_released_yet():
    released = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released.pop(0) == "Unreleased"
    assert released[:1] in ([], [cm.__version__])


def test_version_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compile-modes", "--version"])
    for run in (main, lambda: runpy.run_module("compile_modes", run_name="__main__")):
        with pytest.raises(SystemExit) as end:
            run()
        assert end.value.code == 0
        assert capsys.readouterr().out == VERSIONS


@pytest.mark.parametrize(
    ("started_as", "name"),
    [("/usr/bin/compile-modes", "compile-modes"), ("/x/compile_modes/__main__.py", "python -m compile_modes")],
)
def test_usage_names_the_command_that_was_typed(started_as, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started_as])
    assert main([]) == 2  # no command is wrong usage
    assert capsys.readouterr().out.startswith(f"usage: {name} ")
