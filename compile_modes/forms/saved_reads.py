"""Reads of statistics that the same graph writes: kept for the backward pass instead of being repeated in it."""

from collections.abc import Iterable, Iterator

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from compile_modes.graph import calls
from compile_modes.graph.effects import is_view, viewed, written_operands
from compile_modes.graph.sites import Site
from compile_modes.graph.view import Body, View


def pin_reads(view: View, found: Iterable[Site]) -> list[fx.Node]:
    """Forbids AOTAutograd to compute again, in the backward pass, what was read from a buffer that the graph writes.

    Its partitioner repeats cheap ops in the backward pass instead of saving their results. By then, batch norm has
    updated ``running_var``, and whatever the model has computed from it comes out otherwise: quantization-aware
    training divides by its root in front of each batch norm, and got wrong gradients, silently (2.11 to 2.14;
    pytorch/pytorch#197039). Only the tag of nodes changes, so that the graph computes what it did.

    Args:
        view: a captured graph, its sites in their final modes.
        found: its sites.

    Returns:
        The nodes that are saved where the backward pass needs them.
    """
    sites = {site.node: site for site in found}
    written = {path for value in written_values(view, sites.values()) if (path := view.state[value])}
    pinned = [n for body in view.bodies for n in _reads(body, written) if n not in sites and not calls.is_counter(n)]
    for node in pinned:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return pinned


def written_values(view: View, found: Iterable[Site]) -> list[fx.Node]:
    """What the graphs write to: the operands of nodes that say so, and the statistics of norms that train."""
    operands = [site.read(name) for site in found if site.training for name in site.op.stats]
    operands += [viewed(value) for node in view.nodes() for value in written_operands(node)]
    return [value for value in operands if isinstance(value, fx.Node)]


def _reads(body: Body, written: set[str]) -> Iterator[fx.Node]:
    """The nodes that make a value of their own from one of these buffers, or from a view of it."""
    state = body.view.state
    aliases = {n for n in body.graph.nodes if n.op in ("placeholder", "get_attr") and state[n] in written}
    for node in body.graph.nodes:
        if node.op != "call_function" or aliases.isdisjoint(node.all_input_nodes):
            continue
        if is_view(node.target):
            aliases.add(node)
        else:
            yield node
