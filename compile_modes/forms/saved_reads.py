"""Reads of statistics that the same graph writes: kept for the backward pass instead of being repeated in it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from compile_modes.graph import calls
from compile_modes.graph.effects import is_view, viewed, written_operands
from compile_modes.graph.sites import Site
from compile_modes.graph.view import Body, View

_PINNED = "compile_modes_pinned"  # in the meta of a graph with pinned reads
# AOTAutograd's cache does not look at the tag, and must not answer with what was compiled without it.
_CACHE_KEY = "compile_modes: reads of mutated buffers are saved"


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
    operands = [s.read(name) for s in sites.values() if s.training for name in s.op.stats]
    operands += [viewed(value) for node in view.nodes() for value in written_operands(node)]
    written = {path for value in operands if isinstance(value, fx.Node) and (path := view.state[value])}
    pinned = [n for body in view.bodies for n in _reads(body, written) if n not in sites and not calls.is_counter(n)]
    for node in pinned:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    view.root.__dict__["meta"][_PINNED] = bool(pinned)
    return pinned


def keyed(compile_fx: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """A compiler whose cache keeps graphs with pinned reads apart from graphs without."""

    config: Any = torch.compiler.config

    def run(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        if not gm.meta.get(_PINNED):
            return compile_fx(gm, example_inputs)
        with config.patch(cache_key_tag=config.cache_key_tag + _CACHE_KEY):
            return compile_fx(gm, example_inputs)

    return run


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
