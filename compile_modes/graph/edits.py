"""The edits that a change of mode consists of, each of one node or a few."""

import operator
from typing import Any, cast

import torch
from torch import fx

from compile_modes.graph import calls
from compile_modes.graph.sites import Reach, Site

_RELAYING = (
    operator.getitem,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.contiguous.default,
)


def set_argument(site: Site, name: str, value: Any) -> None:
    """Replaces one argument of a node, found by its name in the schema.

    FX leaves trailing defaults out; an argument that is not there is added by name, and is left out again when it
    goes back to its default, so that a round trip gives the same text.
    """
    node, index = site.node, site.op.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    elif value == site.op.default(name) and not isinstance(value, fx.Node):
        node.kwargs = {key: v for key, v in node.kwargs.items() if key != name}
    else:
        node.update_kwarg(name, value)


def insert_dropout(site: Site, p: float, flag: fx.Node | bool) -> None:
    """Puts the dropout that a softmax of attention weights is followed by in train behind it."""
    graph, weights = site.node.graph, site.node
    with graph.inserting_after(max(weights, flag) if isinstance(flag, fx.Node) else weights):
        dropped = graph.call_function(torch.ops.aten.dropout.default, (weights, p, flag))
    weights.replace_all_uses_with(dropped, delete_user_cb=lambda user: user is not dropped)
    dropped.meta = {k: v for k, v in weights.meta.items() if k in ("nn_module_stack", "val", "stack_trace")}


def loosen_views(attention: fx.Node) -> None:
    """Makes views of an attention's output reshapes, in place.

    The kernel, and with it the layout of the output, depends on whether there is dropout; export has left out the
    ``contiguous()`` before a view wherever the exported kernel's layout needed none.
    """
    following = list(attention.users)
    for node in following:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
        elif node.target in _RELAYING:
            following.extend(node.users)


def insert_step(reach: Reach, flag: fx.Node | bool) -> fx.Node:
    """A new step of a counter, bound to ``flag`` or unconditional."""
    counter = reach.counter if isinstance(reach.counter, fx.Node) else attr_node(reach.body.graph, reach.counter)
    return calls.insert_counter(reach.body.graph, reach.anchor, counter, flag)


def attr_node(graph: fx.Graph, target: str) -> fx.Node:
    """The ``get_attr`` node for an attribute; a new one, before the first computation, if there is none."""
    for node in graph.find_nodes(op="get_attr", sort=False):
        if node.target == target:
            return cast(fx.Node, node)
    # Not graph.get_attr(): it warns about attributes that are neither parameters, buffers nor modules.
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        return graph.create_node("get_attr", target)
