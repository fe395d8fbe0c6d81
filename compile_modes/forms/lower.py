"""Every site of a graph in the form that its mode asks for: what runs last before Inductor."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from compile_modes import logs, messages
from compile_modes.forms.data import Inputs, as_data
from compile_modes.forms.recurrent import split_layers
from compile_modes.forms.saved_reads import pin_reads
from compile_modes.forms.tune import tune
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View

_TAG = "recompute"  # what AOTAutograd's partitioner reads in the meta of a node: save, or compute again


def lower(graph: fx.GraphModule, found: Sequence[Site], *, tuned: bool = False) -> fx.GraphModule:
    """Lowers sites as their mode, now final, asks for.

    Args:
        graph: a graph in front of autograd; edited in place.
        found: its sites.
        tuned: whether batch norms in eval mode are to be folded, where that saves memory in training.
    """
    view = View(graph)
    chosen, left = split_layers(view, found)
    pairs = tune(view, found) if tuned else []
    logs.forms([*chosen, *((pair.site, pair.form) for pair in pairs)])
    for site in left:
        messages.RNN_DROPOUT_LOST.warn_once(op=site.op.overload, owner=site.owner)
    pin_reads(view, found)
    return graph


def lower_as_data(
    graph: fx.GraphModule, found: Sequence[Site], chosen: Mapping[Site, int], *, tuned: bool = False
) -> Inputs:
    """As :func:`lower`, with dropouts whose mode is data, each with the position of its flag; says what they take."""
    lower(graph, found, tuned=tuned)
    return as_data(graph, chosen)


def keyed(compile_fx: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """A compiler whose cache keeps graphs apart that differ in tags only.

    AOTAutograd's cache does not look at tags, and must not answer with what was compiled with others, or with none.
    """
    config: Any = torch.compiler.config

    def run(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
        nodes = enumerate(node for graph in graphs for node in graph.nodes)
        tags = [(position, str(node.meta[_TAG])) for position, node in nodes if _TAG in node.meta]
        if not tags:
            return compile_fx(gm, example_inputs)
        digest = hashlib.sha256(repr(tags).encode()).hexdigest()
        with config.patch(cache_key_tag=f"{config.cache_key_tag}compile_modes: tags {digest}"):
            return compile_fx(gm, example_inputs)

    return run
