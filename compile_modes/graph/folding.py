"""Makes a region one call with a flag, and a call with a literal flag its nodes again, or nothing."""

import itertools
import operator
from typing import Any, cast

from torch import fx, nn

from compile_modes.graph.calls import FOLDED, switch
from compile_modes.graph.edits import OWNED
from compile_modes.graph.regions import Region
from compile_modes.graph.sizes import compute_at
from compile_modes.graph.view import Body, View, attribute

_REPLACED = "compile_modes_replaced"


def fold(region: Region, body: Body) -> fx.Node:
    """Makes a region the body of one call with the literal mode True, in place; returns the call."""
    for size in region.sizes:
        if moved := compute_at(body, size, region.nodes[0]):
            size.meta[_REPLACED] = moved
    inner, holders = fx.Graph(), {}
    inside: dict[fx.Node, fx.Node] = {}
    operands = [_present(operand) for operand in region.operands]
    for operand in operands:
        inside[operand] = inner.placeholder(operand.name)
        inside[operand].meta = dict(operand.meta)
    for node in region.nodes:
        for held in (n for n in node.all_input_nodes if n not in inside):
            holders[str(held.target)] = body.view.held[held]
            inside[held] = inner.create_node("get_attr", str(held.target))
        inside[node] = inner.node_copy(node, inside.__getitem__)
    inner.output(tuple(inside[node] for node, _ in region.results))
    name = _unused(body.module, f"_{region.gate.__name__}")
    module = fx.GraphModule(holders, inner)
    module.meta[OWNED] = True
    setattr(body.module, name, module)
    with body.graph.inserting_before(region.nodes[0]):
        holder = body.graph.create_node("get_attr", name)
        call = body.graph.call_function(region.gate, (True, len(region.results), holder, *operands))
        call.meta = {k: v for k, v in region.node.meta.items() if k in ("nn_module_stack", "custom", "stack_trace")}
        for index, (node, _) in enumerate(region.results):
            item = body.graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            node.meta[_REPLACED] = item
    for node in reversed(region.nodes):
        body.graph.erase_node(node)
    return call


def _present(node: fx.Node) -> fx.Node:
    """What stands for a node now: a region that was found earlier may take the result of one that is folded by now."""
    while (item := node.meta.get(_REPLACED)) is not None:
        node = item
    return node


def unfold(call: fx.Node, body: Body) -> None:
    """Puts the nodes of a call with a literal mode back in its place (train), or removes it (eval)."""
    chosen, holders, operands = _taken(call)
    values: Any = operands[: int(str(call.args[1]))] if chosen is None else ()
    if chosen is not None:
        module = attribute(body.module, str(chosen.target))
        inputs = module.graph.find_nodes(op="placeholder")
        inside = dict(zip(inputs, operands, strict=True))
        with body.graph.inserting_before(call):
            values = body.graph.graph_copy(module.graph, inside)
        for name, held in module.named_children():
            setattr(body.module, name, held)
    for item in list(call.users):
        if item.users:
            item.replace_all_uses_with(values[item.args[1]])
        body.graph.erase_node(item)
    body.graph.erase_node(call)
    for holder in holders:
        if not holder.users:
            body.graph.erase_node(holder)
            delattr(body.module, str(holder.target))


def _taken(call: fx.Node) -> tuple[fx.Node | None, list[fx.Node], list[Any]]:
    """Of a call with a literal mode: what it runs, if anything, all that it might run, and on what."""
    if call.target is switch:
        training, train, evaluation, *operands = call.args
        return cast(fx.Node, train if training else evaluation), cast(list[fx.Node], [train, evaluation]), operands
    training, _, holder, *operands = call.args
    return cast(fx.Node, holder) if training else None, [cast(fx.Node, holder)], operands


def unfold_literals(root: nn.Module) -> None:
    """Unfolds all calls with a literal mode, in place, for compilers that know aten ops only."""
    for body in reversed(View(root).bodies):  # what is within another call first
        for node in list(body.graph.nodes):
            if node.target in FOLDED and isinstance(node.args[0], bool):
                unfold(node, body)


def _unused(module: Any, stem: str) -> str:
    return next(name for i in itertools.count() if not hasattr(module, name := f"{stem}_{i}"))
