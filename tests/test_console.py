import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm
from compile_modes import console, messages
from compile_modes.exported import binding
from compile_modes.package import packaging
from nets import Small

ROWS = [("aten.dropout", "a[red]b"), ("c", ":smile: " + "x" * 200)]


def test_a_table_is_the_same_text_on_every_terminal(monkeypatch):
    plain = console.table(("op", "owner"), ROWS)
    assert_expected_inline(
        plain.replace("x" * 200, "<200 times x>"),
        """\
op            owner
aten.dropout  a[red]b
c             :smile: <200 times x>""",
    )
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "xterm-256color", "JPY_PARENT_PID": "1"}.items():
        monkeypatch.setenv(name, value)
        assert console.table(("op", "owner"), ROWS) == plain


def test_progress_names_the_step_in_hand_on_stderr(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for terminal, show in ((True, True), (False, True), (True, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with console.progress("warming up", ["train [1]", "eval"], show=show) as advance:
            advance()
            advance()
        printed = capsys.readouterr()
        assert ("2/2" in printed.err) is (terminal and show)
        assert printed.out == ""
        assert printed.err == "" or (terminal and show)


def test_a_counter_is_drawn_on_terminals_once_there_is_something_to_count(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for terminal, steps in ((False, 3), (True, 2), (True, 4)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with console.counter("exports", show=True, after=3) as count:
            for _ in range(steps):
                count()
        assert ("4 exports" in capsys.readouterr().err) is (terminal and steps == 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.counter("exports", show=True, after=0) as count:
        pass
    assert "0 exports" in capsys.readouterr().err
    with console.counter("exports", show=False, after=1) as count:
        count()
    assert capsys.readouterr().err == ""


def test_without_rich_only_tables_fail(monkeypatch, capsys):
    program = torch.export.export(Small(3), (torch.randn(2, 3),))
    monkeypatch.setitem(sys.modules, "rich.table", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(cm.CompileModesError) as error:
        cm.explain(program)
    assert_expected_inline(
        str(error.value),
        """\
CM901: tables need rich, which is not installed
  what to do: pip install rich""",
    )
    with console.progress("warming up", ["train"], show=True) as advance:
        advance()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_importing_the_package_does_not_import_rich():
    script = "import sys, compile_modes; assert not [name for name in sys.modules if name.startswith('rich')]"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def on_a_terminal(monkeypatch):
    """Makes stderr a terminal, wide enough for any line."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


class Long(torch.nn.Module):
    """As many ops as are asked for, behind a dropout."""

    def __init__(self, ops):
        super().__init__()
        self.ops, self.drop = ops, torch.nn.Dropout(0.5)

    def forward(self, x):
        for _ in range(self.ops):
            x = x + 1
        return self.drop(x)


def test_binding_shows_its_stages_if_the_program_is_large(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    program = torch.export.export(Long(20), (torch.ones(2),))
    cm.bind(program)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(binding, "_LARGE", len(program.graph.nodes))
    cm.bind(program)
    assert "bind" in (shown := capsys.readouterr().err)
    assert "4/4" in shown
    cm.bind(program.module())
    assert "4/4" in capsys.readouterr().err


def test_export_shows_how_many_it_has_made(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    cm.export(Small(3), (torch.randn(2, 3),))
    assert "2 exports" in capsys.readouterr().err
    cm.export(Small(3), (torch.randn(2, 3),), progress=False)
    assert capsys.readouterr().err == ""


def test_a_package_names_the_mode_that_it_compiles(capsys, tmp_path, monkeypatch):
    on_a_terminal(monkeypatch)
    said = []

    def compiled(mode, program, options):
        said.append(mode)
        raise messages.NOT_COMPILABLE.error(mode=mode, error="stopped here")

    monkeypatch.setattr(packaging, "_compiled", compiled)
    monkeypatch.setattr(packaging.aoti, "missing", lambda: "")
    with pytest.raises(cm.PackageError):
        cm.package(Small(3), (torch.randn(2, 3),), tmp_path / "a.pt2", modes=("eval",))
    assert said == ["eval"]
    assert "package: compile eval" in (shown := capsys.readouterr().err)
    assert "1/3" in shown
    with pytest.raises(cm.PackageError):
        cm.package(Small(3), (torch.randn(2, 3),), tmp_path / "a.pt2", modes=("eval",), progress=False)
    assert capsys.readouterr().err == ""
