"""What the user sees while something takes long."""

import contextlib
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def progress(title: str, steps: Sequence[str], show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar that names the step in progress; yields the function that ends one step and begins the next.

    Without rich, which is optional, or with ``show`` False, there is no bar.
    """
    try:
        if not show:
            raise ModuleNotFoundError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        upcoming = iter([*(f"{title}: {step}" for step in steps), title])
        task = bar.add_task(next(upcoming), total=len(steps))
        yield lambda: bar.update(task, advance=1, description=next(upcoming, title))
