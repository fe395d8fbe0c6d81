"""Binds a program of which other exports say how the mode of each site was decided."""

from collections.abc import Callable, Mapping, Sequence

from torch import fx, nn

from compile_modes.exported.binding import carry_out
from compile_modes.exported.pairing import Pairing
from compile_modes.exported.planning import Plan
from compile_modes.exported.switching.switches import Merged
from compile_modes.graph.finding import find
from compile_modes.graph.sites import KEPT, Site, add_note
from compile_modes.graph.view import View


def bind_merged(root: nn.Module, merged: Merged) -> nn.Module:
    """Binds a program whose graph is a merged one."""
    return bind_known(
        root,
        merged,
        merged.switches,
        lost=merged.lost,
        counts_in_both=lambda site: site.node in merged.kept_steps,
        counts_in_train=lambda site: site.node in merged.counting,
    )


def bind_known(
    root: nn.Module,
    found: Pairing | Merged,
    calls: Sequence[fx.Node],
    *,
    lost: Mapping[fx.Node, float] | None = None,
    counts_in_both: Callable[[Site], bool],
    counts_in_train: Callable[[Site], bool],
) -> nn.Module:
    """Binds a train program of which both exports are known.

    Args:
        root: the module of the program.
        found: which sites follow their owner's flag, which its reverse, and which none.
        calls: further nodes that follow it: folded regions and switches.
        lost: probabilities that nodes have in train and don't show.
        counts_in_both: whether the counter of a site steps in both modes.
        counts_in_train: whether that of a site with a literal steps in train only.
    """
    view = View(root)
    by_node = {site.node: site for site in find(view)}
    bindable = [by_node[node] for node in (*found.bound, *found.inverted, *calls)]
    for site in by_node.values():
        if site.step is not None and counts_in_both(site):  # the model's own statement
            add_note(site.step, mode=KEPT)
            site.step = None
    odd = [by_node[node] for node in found.fixed]
    odd += [site for site in by_node.values() if site.region is not None]  # a mask that eval has as well
    probabilities = {by_node[node]: p for node, p in {**found.inverted, **(lost or {})}.items() if p is not None}
    plan = _plan(view, bindable, odd, {by_node[node] for node in found.inverted}, probabilities)
    plan.counting = [site for site in odd if site.step is not None and counts_in_train(site)]
    carry_out(plan)
    return root


def _plan(view: View, bindable: list[Site], odd: list[Site], inverted: set[Site], supplied: dict[Site, float]) -> Plan:
    modes = {site.owner: True for site in bindable}
    return Plan(view, True, True, modes, bindable, [], odd, set(), supplied=supplied, inverted=inverted)
