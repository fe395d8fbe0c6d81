"""What the backend does, for ``TORCH_LOGS="+compile_modes"``, the ``logging`` module, and ``TORCH_TRACE`` / tlparse.

One line per graph at level INFO; graphs and sites at DEBUG. Nothing is put into words unless someone listens.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from compile_modes import _compat

logger = logging.getLogger("compile_modes")


def listening() -> bool:
    """Whether anyone wants to see graphs or sites."""
    return logger.isEnabledFor(logging.INFO) or _compat.is_traced()


def graph(stage: str, module: fx.GraphModule) -> None:
    """Records a graph under the name of the stage that it has come through: "captured" or "rewritten"."""
    artifact(f"{stage}_graph", lambda: str(module.print_readable(print_output=False)))


def artifact(name: str, text: Callable[[], str]) -> None:
    """Records a text: logged at DEBUG, and as ``compile_modes_<name>`` in the structured trace of this compilation."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s:\n%s", name, text())
    _compat.trace_artifact(f"compile_modes_{name}", text)


def modes(found: Iterable[Any], report: Any) -> None:
    """Records the mode that each site is compiled in, and what options have changed against the flags.

    Args:
        found: the sites.
        report: what :func:`compile_modes.set_mode` reports of the options; None if there are none.
    """
    found = list(found)

    def text() -> str:
        lines = [str(site) for site in found] or ["no mode-dependent sites"]
        return "\n".join([*lines, "follows the flags" if report is None else f"options: {report}"])

    artifact("modes", text)
    count = Counter({True: "train", False: "eval", None: "the same in both"}[site.training] for site in found)
    summary = ", ".join(f"{n} in {mode}" for mode, n in sorted(count.items())) or "none"
    changed = "" if report is None else f"; options changed {len(report.changed)}"
    logger.info("sites: %s%s", summary, changed)


def forms(chosen: Iterable[tuple[Any, str]]) -> None:
    """Records the sites that are lowered to something else than the op that they are, each with its form."""
    if pairs := list(chosen):
        artifact("forms", lambda: "\n".join(f"{site}: {form}" for site, form in pairs))


def left_to_stock(reason: str) -> None:
    """Records why a graph goes to Inductor as it came."""
    logger.info("a graph goes to Inductor as it came: %s", reason)
    _compat.trace_artifact("compile_modes_left_to_stock", lambda: reason)
