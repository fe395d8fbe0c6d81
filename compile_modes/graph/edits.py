"""The edits that a change of mode consists of, each of one node or a few; and graphs of one's own to edit."""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat
from compile_modes._compat.tracing import trace_in_place_of
from compile_modes.graph import calls
from compile_modes.graph.sites import Reach, Site
from compile_modes.graph.view import Body, View, attribute

OWNED = "compile_modes_owned"  # in the meta of a body that belongs to one module alone

_RELAYING = (
    operator.getitem,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.contiguous.default,
)


def own(view: View) -> bool:
    """Gives a module bodies of its own, ahead of an edit; returns whether any was replaced, so that the view is old.

    ``ep.module()`` and ``unflatten(ep)`` hand out the very body modules of the ExportedProgram, so an edit in place
    would reach the program and every other module made from it.
    """
    replaced: set[nn.Module] = set()
    for body in view.bodies:
        if body.parent is None or body.caller is None:
            continue
        module = body.module
        if body.parent.module in replaced:
            replaced.add(module)  # below a copy, which has seen to its own bodies
        elif body.caller.op == "call_function" and isinstance(module, fx.GraphModule) and OWNED not in module.meta:
            copied = fx.GraphModule(module, copy.deepcopy(body.graph))
            copied.meta = {**module.meta, OWNED: True}
            own(View(copied))
            holder, _, name = body.path.removeprefix(body.parent.path).lstrip(".").rpartition(".")
            setattr(attribute(body.parent.module, holder) if holder else body.parent.module, name, copied)
            replaced.add(module)
    return bool(replaced)


def hoist_constants(root: nn.Module) -> None:
    """Moves the constants of a program out of its submodules, where another program may have others of the name."""
    for node in root.graph.find_nodes(op="get_attr"):  # type: ignore[union-attr, operator]
        path, _, name = str(node.target).rpartition(".")
        holder = attribute(root, path) if path else root
        if path and isinstance(vars(holder).get(name), torch.Tensor):
            node.target = f"_constant_{len(vars(root))}"
            setattr(root, node.target, vars(holder)[name])
    _compat.refresh(root)


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
    counter = reach.counter if isinstance(reach.counter, fx.Node) else attr_node(reach.body, reach.counter)
    return calls.insert_counter(reach.body.graph, reach.anchor, counter, flag)


def attr_node(body: Body, target: str) -> fx.Node:
    """The ``get_attr`` node for an attribute; a new one, before the first computation, if there is none."""
    graph, reads, head = body.graph, body.view.reads[body.graph], body.view.head
    if target not in reads:
        # Not graph.get_attr(): it warns about attributes that are neither parameters, buffers nor modules.
        with graph.inserting_after(head[graph]):
            reads[target] = head[graph] = graph.create_node("get_attr", target)
    return reads[target]


def insert_traced(before: fx.Node, like: fx.Node, function: Callable[..., Any], operands: Sequence[fx.Node]) -> Any:
    """Traces a function on operands, and puts its nodes, with the meta of ``like``, in front of a node."""
    traced = trace_in_place_of(like, function, [_compat.value(operand) for operand in operands])
    inputs = traced.graph.find_nodes(op="placeholder")
    with before.graph.inserting_before(before):
        return before.graph.graph_copy(traced.graph, dict(zip(inputs, operands, strict=True)))
