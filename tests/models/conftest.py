"""Collects what the tests of whole models find, and prints it as one table at the end of the run."""

from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.table import Table

from zoo import CASES, Case

COLUMNS = ("sites", "graphs", "train and eval against eager", "one train export, bound", "round trips")
LINE = "line of the table of models"  # the property of a test's report, which reaches the process that prints


@pytest.fixture
def row(case: Case, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The line of the table for the model under test."""
    line: dict[str, str] = {}
    yield line
    request.node.user_properties.append((LINE, [f"{case.library} {case.name}", line]))


@pytest.fixture(params=CASES, ids=lambda case: f"{case.library}-{case.name}")
def case(request: pytest.FixtureRequest) -> Case:
    """Each model whose library is there; the table says which are not."""
    try:
        pytest.importorskip(request.param.library)
    except pytest.skip.Exception:
        missing = dict.fromkeys(COLUMNS, "not installed")
        request.node.user_properties.append((LINE, [f"{request.param.library} {request.param.name}", missing]))
        raise
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    properties = [found for report in reports for found in getattr(report, "user_properties", ())]
    rows = dict(value for name, value in properties if name == LINE)
    if not rows:
        return
    table = Table(title="whole models against eager PyTorch")
    for title in ("model", *COLUMNS):
        table.add_column(title)
    for model in (f"{case.library} {case.name}" for case in CASES):
        if model in rows:
            table.add_row(model, *(rows[model].get(column, "FAILED") for column in COLUMNS))
    terminalreporter.write_line("")
    Console(width=180).print(table)
