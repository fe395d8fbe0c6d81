"""Collects what the tests of whole models find, and prints it as one table at the end of the run."""

import pytest
from rich.console import Console
from rich.table import Table

from zoo import CASES, Case

ROWS: dict[str, dict[str, str]] = {}
COLUMNS = ("sites", "graphs", "train and eval against eager", "one train export, bound", "round trips")


@pytest.fixture
def row(case: Case) -> dict[str, str]:
    """The line of the table for the model under test."""
    return ROWS.setdefault(f"{case.library} {case.name}", {})


@pytest.fixture(params=CASES, ids=lambda case: f"{case.library}-{case.name}")
def case(request: pytest.FixtureRequest) -> Case:
    """Each model whose library is there; the table says which are not."""
    try:
        pytest.importorskip(request.param.library)
    except pytest.skip.Exception:
        ROWS[f"{request.param.library} {request.param.name}"] = dict.fromkeys(COLUMNS, "not installed")
        raise
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    table = Table(title="whole models against eager PyTorch")
    for title in ("model", *COLUMNS):
        table.add_column(title)
    for name, line in ROWS.items():
        table.add_row(name, *(line.get(column, "FAILED") for column in COLUMNS))
    terminalreporter.write_line("")
    Console(width=180).print(table)
