"""Every site of a graph in the form that its mode asks for: what runs last before Inductor."""

from collections.abc import Sequence

from torch import fx

from compile_modes import logs, messages
from compile_modes.forms.recurrent import split_layers
from compile_modes.forms.saved_reads import pin_reads
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View


def lower(graph: fx.GraphModule, found: Sequence[Site]) -> fx.GraphModule:
    """Lowers sites as their mode, now final, asks for."""
    view = View(graph)
    chosen, left = split_layers(view, found)
    logs.forms(chosen)
    for site in left:
        messages.RNN_DROPOUT_LOST.warn_once(op=site.op.overload, owner=site.owner)
    pin_reads(view, found)
    return graph
