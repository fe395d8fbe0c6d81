"""What the backend and the pass do to a captured graph: every site is put into its mode, and lowered as that asks."""

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from compile_modes.errors import ModeWarning, OverrideError
from compile_modes.folding import unfold_literals
from compile_modes.forms.recurrent import split_layers
from compile_modes.rewrite import apply, assign, owner_matches
from compile_modes.sites import Site

WARNED: set[str] = set()


def warn_once(text: str) -> None:
    """A ModeWarning that this process has not seen before."""
    if text not in WARNED:
        WARNED.add(text)
        warnings.warn(text, ModeWarning, stacklevel=3)


def put_into_modes(
    captured: fx.GraphModule,
    found: Sequence[Site],
    training: bool | None,
    overrides: Mapping[str, str],
    *,
    whole: bool,
    refusal: Callable[[Site, bool], str] = Site.refusal,
) -> tuple[Site, ...]:
    """Rewrites a captured graph as asked, in place.

    Args:
        captured: the graph.
        found: its sites.
        training: the mode for all sites that no override names.
        overrides: ``{owner glob: "train" | "eval"}``.
        whole: whether the graph is all of a function, so that a pattern that matches nothing is an error; otherwise it
            may be meant for another part.
        refusal: why a site can't be put into a mode.

    Returns:
        The sites that were put into another mode.

    Raises:
        OverrideError: a pattern matches no site, or a site can't be put into the mode asked for.
    """
    owners = {site.owner for site in found}
    if not whole:
        overrides = {p: m for p, m in overrides.items() if any(owner_matches(o, p) for o in owners)}
    report = apply(captured, assign(found, training, overrides), refusal)
    if report.refused:
        raise OverrideError(
            f"{len(report.refused)} sites can't be put into the mode that was asked for:\n"
            + "\n".join(f"  {site}: {why}" for site, why in report.refused),
            remedy='leave them out by a pattern of their own that comes first, such as {"*.self_attn": "eval"}',
        )
    unfold_literals(captured)
    captured.recompile()
    return report.changed


def in_form(graph: fx.GraphModule, found: Sequence[Site]) -> fx.GraphModule:
    """Lowers sites as their mode, now final, asks for."""
    for site in split_layers(graph, found):
        warn_once(
            f"{site.op.overload} (owner {site.owner!r}) is compiled without its dropout between layers: torch's "
            "decomposition loses it (_decomp/decompositions.py). Run this module in eager mode to train with it."
        )
    return graph
