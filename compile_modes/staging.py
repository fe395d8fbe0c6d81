"""What the backend and the pass do to a captured graph: every site is put into its mode, and lowered as that asks."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from compile_modes import logs
from compile_modes.errors import ModeWarning
from compile_modes.folding import unfold_literals
from compile_modes.forced import (
    check_names,
    check_patterns,
    check_recurrent,
    decided_by_python,
    refused,
    supply_dropout,
)
from compile_modes.forms.recurrent import split_layers
from compile_modes.forms.saved import pin_reads
from compile_modes.owners import Names
from compile_modes.rewrite import apply, assign, owner_matches
from compile_modes.sites import Site

WARNED: set[Any] = set()


def warn_once(text: str, *about: Any) -> None:
    """A ModeWarning that this process has not seen before, or not about the same things."""
    if (text, *about) not in WARNED:
        WARNED.add((text, *about))
        warnings.warn(text, ModeWarning, stacklevel=3)


def put_into_modes(
    captured: fx.GraphModule,
    found: Sequence[Site],
    names: Names,
    training: bool | None,
    overrides: Mapping[str, str],
    dropout_p: Mapping[str, float] | None = None,
    *,
    whole: bool,
    refusal: Callable[[Site, bool], str] = Site.refusal,
) -> tuple[Site, ...]:
    """Rewrites a captured graph as asked, in place.

    Args:
        captured: the graph.
        found: its sites, owners under their full names.
        names: what is known of the modules of the compilation.
        training: the mode for all sites that no override names.
        overrides: ``{owner glob: "train" | "eval"}``.
        dropout_p: ``{owner glob: probability}`` of attention that was traced in eval.
        whole: whether the graph is all of a function, so that a pattern that matches nothing is an error; otherwise it
            may be meant for another part.
        refusal: why a site can't be put into a mode.

    Returns:
        The sites that were put into another mode.

    Raises:
        OverrideError: a pattern matches no site, or a site can't be put into the mode asked for.

    Warns:
        ModeWarning: modules are asked to be in another mode than their flag says, which Python has read.
    """
    owners = {site.owner for site in found}
    if overrides:
        names.pin()
    supply_dropout(found, dropout_p or {}, names)
    check_recurrent(names, training, overrides)
    if whole:
        overrides = check_patterns(overrides, found, names)
    else:
        check_names(overrides, names.everything)
        overrides = {p: m for p, m in overrides.items() if any(owner_matches(o, p) for o in owners)}
    if decided := decided_by_python(found, names, training, overrides):
        warn_once(
            f"{', '.join(decided[:5])} read their training flag in Python, where options can't reach: what "
            "depends on it stays as the flag says.\n  what to do: set the flag, by train() or eval() of the module",
            id(names.everything.get("")), training, *overrides.items(),
        )  # fmt: skip
    report = apply(captured, assign(found, training, overrides), refusal)
    if report.refused:
        raise refused(report)
    logs.modes(found, report)
    unfold_literals(captured)
    captured.recompile()
    return report.changed


def in_form(graph: fx.GraphModule, found: Sequence[Site]) -> fx.GraphModule:
    """Lowers sites as their mode, now final, asks for."""
    chosen, left = split_layers(graph, found)
    logs.forms(chosen)
    for site in left:
        warn_once(
            f"{site.op.overload} (owner {site.owner!r}) is compiled without its dropout between layers: torch's "
            "decomposition loses it (_decomp/decompositions.py). Run this module in eager mode to train with it."
        )
    pin_reads(graph, found)
    return graph
