"""Numbers in a graph that are made of sizes alone, and so are the same wherever they are computed."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from compile_modes import _compat
from compile_modes.graph.view import Body

aten = torch.ops.aten
FLOATS = (float, torch.SymFloat)
SCALARS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
MEASURES = frozenset({aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default})


def is_scalar(node: fx.Node) -> bool:
    """Whether the value of a node is a number."""
    return isinstance(_compat.value(node), SCALARS)


def late(body: Body, operands: Iterable[fx.Node], start: int, order: dict[fx.Node, int]) -> tuple[fx.Node, ...] | None:
    """The nodes behind position ``start`` that operands are computed by, in graph order.

    None if any of them may not be computed at ``start`` already.
    """
    found: set[fx.Node] = set()
    queue = [node for node in operands if order[node] > start]
    while queue:
        node = queue.pop()
        if is_size_of_region(body, node):
            inputs = node.all_input_nodes[0].all_input_nodes
        elif _is_size(node):
            inputs = node.all_input_nodes
        else:
            return None
        found.add(node)
        queue += [n for n in inputs if order[n] > start and n.op != "get_attr"]
    return tuple(sorted(found, key=order.__getitem__))


def _is_size(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_scalar(node):
        return False
    inputs = node.all_input_nodes
    if node.target is aten.item.default:  # how Dynamo reads numbers that it made inputs, with ``dynamic=True``
        return inputs[0].op == "placeholder" and all(user.target is aten.item.default for user in inputs[0].users)
    return node.target in MEASURES or all(map(is_scalar, inputs))


def is_size_of_region(body: Body, node: fx.Node) -> bool:
    """Whether a node is a size that a no_grad or autocast region returns, because something behind it uses it too."""
    caller = node.args[0] if node.target is operator.getitem else None
    if not isinstance(caller, fx.Node) or caller.target not in _compat.UNCONDITIONAL_HOPS:
        return False
    child = body.children.get(caller)
    if child is None:
        return False
    queue = [_returned(child, node)]
    while queue:
        result = queue.pop()
        if not isinstance(result, fx.Node) or not is_scalar(result) or result.target is aten.item.default:
            return False
        if result.op != "placeholder" and not _is_size(result):
            return False
        queue += result.all_input_nodes
    return True


def compute_at(body: Body, node: fx.Node, position: fx.Node) -> fx.Node | None:
    """Has a size computed before ``position``; returns the node that takes its place, if another one does."""
    if not is_size_of_region(body, node):
        position.prepend(node)
        return None
    caller = node.all_input_nodes[0]
    child = body.children[caller]
    inputs = child.inputs
    inside: dict[fx.Node, Any] = dict(zip(inputs, caller.args[len(caller.args) - len(inputs) :], strict=True))

    def copied(inner: fx.Node) -> fx.Node:
        if inner not in inside:
            inside[inner] = body.graph.node_copy(inner, copied)
        return inside[inner]  # type: ignore[no-any-return]

    with body.graph.inserting_before(position):
        size = copied(_returned(child, node))
    node.replace_all_uses_with(size)
    body.graph.erase_node(node)
    return size


def _returned(child: Body, item: fx.Node) -> Any:
    results: Any = child.graph.output_node().args[0]
    return results[item.args[1]]
