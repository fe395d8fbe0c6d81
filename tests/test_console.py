import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm
from compile_modes import console
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
    with console.progress("warming up", ["train [1]", "eval"], show=True) as advance:
        advance()
        advance()
    printed = capsys.readouterr()
    assert "2/2" in printed.err
    assert printed.out == ""
    with console.progress("warming up", ["train"], show=False) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_a_counter_is_drawn_on_terminals_once_there_is_something_to_count(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for terminal, steps in ((False, 3), (True, 2), (True, 4)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with console.counter("exports", show=True, after=3) as count:
            for _ in range(steps):
                count()
        assert ("4 exports" in capsys.readouterr().err) is (terminal and steps == 4)
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


def test_importing_the_package_does_not_import_rich():
    script = "import sys, compile_modes; assert not [name for name in sys.modules if name.startswith('rich')]"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
