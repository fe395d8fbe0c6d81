"""Tables and progress bars, drawn by rich. It is imported when something is drawn, so that the rest runs without it."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from compile_modes import messages

_UNBOUNDED = 1 << 20  # columns of the console that tables are drawn on
_PIECE = 64  # rows that are drawn at a time


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, the same on every terminal: one line a row, no colours, no wrapping, no markup.

    Args:
        head: titles of the columns.
        rows: cells, as many in each row as there are titles.

    Raises:
        CompileModesError: rich is not installed.
    """
    rich = _rich("table", "console", "text", "cells")
    if rich is None:
        raise messages.NO_RICH.error()
    widths = [max(map(rich["cells"].cell_len, column)) for column in zip(head, *rows, strict=True)]
    stream = io.StringIO()
    # Said in full, for rich would otherwise ask the environment: COLUMNS, FORCE_COLOR, a notebook.
    console = rich["console"].Console(
        file=stream,
        width=_UNBOUNDED,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
        _environ={},
    )
    # In pieces: what rich takes for a table grows with the square of its rows.
    for start in range(0, max(len(rows), 1), _PIECE):
        drawn = rich["table"].Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=start == 0)
        for title, width in zip(head, widths, strict=True):
            drawn.add_column(rich["text"].Text(title), no_wrap=True, min_width=width)
        for row in rows[start : start + _PIECE]:
            drawn.add_row(*map(rich["text"].Text, row))
        console.print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


@contextlib.contextmanager
def progress(title: str, steps: Sequence[str], show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on the terminal that names the step in hand.

    >>> with progress("warming up", ["train", "eval"], show=False) as advance:
    ...     for mode in (True, False):
    ...         advance()

    Args:
        title: what is going on.
        steps: a name for each step.
        show: whether to draw anything; nothing is drawn without rich, or if stderr is no terminal.

    Returns:
        A context manager that gives the function to call after each step.
    """
    rich = _rich("progress", "console") if show and sys.stderr.isatty() else None
    if rich is None:
        yield lambda: None
        return
    columns = (
        rich["progress"].TextColumn("{task.description}", markup=False),
        rich["progress"].BarColumn(),
        rich["progress"].MofNCompleteColumn(),
        rich["progress"].TimeElapsedColumn(),
    )
    with rich["progress"].Progress(*columns, console=rich["console"].Console(stderr=True)) as bar:
        names = iter(steps)
        task = bar.add_task(_described(title, names), total=len(steps))
        yield lambda: bar.update(task, advance=1, description=_described(title, names))


@contextlib.contextmanager
def counter(title: str, *, show: bool, after: int) -> Iterator[Callable[[], None]]:
    """A line on the terminal that counts steps whose number isn't known, and their time; gone afterwards.

    >>> with counter("exports", show=False, after=0) as count:
    ...     count()

    Args:
        title: what is counted.
        show: whether to draw anything; nothing is drawn without rich, or if stderr is no terminal.
        after: how many steps are not worth a line; with 0, there is one from the beginning.

    Returns:
        A context manager that gives the function to call after each step.
    """
    rich = _rich("progress", "console") if show and sys.stderr.isatty() else None
    if rich is None:
        yield lambda: None
        return
    columns = (
        rich["progress"].TextColumn("{task.completed} {task.description}", markup=False),
        rich["progress"].TimeElapsedColumn(),
    )
    bar = rich["progress"].Progress(*columns, console=rich["console"].Console(stderr=True), transient=True)
    task, done = bar.add_task(title, total=None), 0

    def count() -> None:
        nonlocal done
        done += 1
        bar.update(task, completed=done)
        if done == after:
            bar.start()

    try:
        if not after:
            bar.start()
        yield count
    finally:
        bar.stop()


def _described(title: str, names: Iterator[str]) -> str:
    name = next(names, "")
    return f"{title}: {name}" if name else title


def _rich(*parts: str) -> dict[str, Any] | None:
    """Submodules of rich by name; None if it is not installed."""
    try:
        return {part: importlib.import_module(f"rich.{part}") for part in parts}
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        return None
