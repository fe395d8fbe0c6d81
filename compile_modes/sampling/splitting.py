"""Parts a graph where the first random number is drawn: what runs once, and what runs for each repetition.

Everything that depends on a random number is in the second part, by data or by memory: what reads a value after a part
that depends on one has written to it. Nothing else is, but for what shares the memory of a value that is written there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compile_modes.graph.effects import has_effect
from compile_modes.graph.sites import BOUND
from compile_modes.graph.view import View
from compile_modes.sampling import lowering
from compile_modes.sampling.effects import Memory, draws, written

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


@dataclass
class Plan:
    """Where a graph is parted.

    Attributes:
        live: the nodes of the second part.
        crossing: values of the first part that the second takes; parameters and buffers that it reads itself are none.
        own: those of them of which each repetition has a copy of its own, because it writes to it; and ``drawn``, those
            that random numbers are drawn for, so that each repetition must have its own.
        parted: nodes of the second part that depend on no random number, but are written to by what does: each
            repetition gets a copy of its own.
    """

    live: set[fx.Node] = field(default_factory=set)
    crossing: list[fx.Node] = field(default_factory=list)
    own: set[fx.Node] = field(default_factory=set)
    drawn: set[fx.Node] = field(default_factory=set)
    parted: set[fx.Node] = field(default_factory=set)


@dataclass
class Parts:
    """The two parts.

    Attributes:
        first: takes the flat inputs of the graph; returns the crossing values, then outputs.
        second: takes a scalar that tells nothing, and the crossing values; returns outputs.
        own, drawn: whether each crossing value is in ``Plan.own``, or in ``Plan.drawn``.
        outputs: where each output comes from: ``("first" | "second", position)``, or ``("literal", value)``.
    """

    first: fx.GraphModule
    second: fx.GraphModule
    own: tuple[bool, ...]
    drawn: tuple[bool, ...]
    outputs: list[tuple[str, Any]]


def split(root: fx.GraphModule) -> Parts:
    """Parts a graph, which is used up.

    Args:
        root: what ``capture`` returns.
    """
    _tidy(root)
    _keep_inputs(root)
    plan = decide(View(root))
    return _apply(root, plan)


def decide(view: View) -> Plan:
    """Where to part a graph in which nothing writes to inputs, parameters or buffers."""
    plan, memory = Plan(), Memory(view.main.graph)
    draw = {node for node in memory.nodes if draws(view, node)}
    writes = {node: [memory.root(value) for value in written(view, node)] for node in memory.nodes}
    moved: set[fx.Node] = set()  # on account of their memory
    while True:
        plan.live, dirty = _live(memory, draw | moved, writes)
        used = {n for node in plan.live for n in node.all_input_nodes if n not in plan.live}
        returned = set(view.main.graph.output_node().all_input_nodes)
        plan.own, more = set(), set[fx.Node]()
        for root in dirty:
            members = [n for n in memory.members(root) if n not in plan.live and n.op == "call_function"]
            outside = [n for n in members if n in used or n in returned]
            if len(outside) == 1 and outside[0] not in returned:
                plan.own.add(outside[0])
            elif outside:
                more.update(members)
        if not more - moved:
            break
        moved |= more
    plan.parted = {n for n in moved if n not in draw and not any(m in moved for m in _shares_with(memory, n))}
    plan.drawn = {n for node in draw for n in node.all_input_nodes if n in used and _is_tensor(view, n)}
    plan.crossing = [n for n in memory.nodes if n in used and (n.op != "get_attr" or n in plan.drawn)]
    return plan


def _live(
    memory: Memory, first: set[fx.Node], writes: dict[fx.Node, list[fx.Node]]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that depend on some, and the roots of the memory that they write to."""
    live, dirty = set[fx.Node](), set[fx.Node]()
    for node in memory.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        if node in first or any(n in live or memory.root(n) in dirty for n in inputs):
            live.add(node)
            dirty.update(writes[node])
    return live, dirty


def _shares_with(memory: Memory, node: fx.Node) -> list[fx.Node]:
    """The operands of a node whose memory it shares."""
    return [n for n in node.all_input_nodes if memory.root(n) is memory.root(node)]


def _is_tensor(view: View, node: fx.Node) -> bool:
    return node.op != "get_attr" or isinstance(view.held[node], torch.Tensor)


def _tidy(root: fx.GraphModule) -> None:
    """Erases checks of inputs and of metadata, which hold for all repetitions, and what nobody reads."""
    for node in reversed(root.graph.nodes):
        if node.op in ("placeholder", "output") or node.users:
            continue
        checks = node.op == "call_module" or node.target is _ASSERT
        if checks or not has_effect(root, node):
            root.graph.erase_node(node)


def _keep_inputs(root: fx.GraphModule) -> None:
    """Has each graph write to copies of inputs, parameters and buffers instead: every repetition starts from the same.

    Attributes that are read several times are read once afterwards.
    """
    read: dict[int, fx.Node] = {}
    view = View(root)
    for node in list(root.graph.find_nodes(op="get_attr")):
        held = view.held[node]
        first = read.setdefault(id(held), node)
        if isinstance(held, torch.Tensor) and first is not node:
            node.replace_all_uses_with(first)
            root.graph.erase_node(node)
    memory = Memory(root.graph)
    roots = {memory.root(value) for node in root.graph.nodes for value in written(view, node)}
    head = next(n for n in root.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in [n for n in memory.nodes if n.op in ("placeholder", "get_attr") and memory.root(n) in roots]:
        if node.op == "get_attr" and not isinstance(view.held[node], torch.Tensor):
            continue
        place = head if node.op == "placeholder" else node.next
        with root.graph.inserting_before(place):
            copied = root.graph.call_function(torch.ops.aten.clone.default, (node,))
        copied.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, own=copied: user is not own)


def _apply(root: fx.GraphModule, plan: Plan) -> Parts:
    first, second = fx.Graph(), fx.Graph()
    in_first: dict[fx.Node, fx.Node] = {}
    in_second: dict[fx.Node, fx.Node] = {}
    scalar = second.placeholder("repetition")
    for node in plan.crossing:
        in_second[node] = second.placeholder(node.name)
    for node in root.graph.nodes:
        if node.op == "output":
            continue
        if node not in plan.live:
            in_first[node] = first.node_copy(node, in_first.__getitem__)
            continue
        for operand in node.all_input_nodes:
            if operand not in in_second:  # a parameter, a buffer, or the graph of a region
                in_second[operand] = second.node_copy(operand)
        copied = in_second[node] = second.node_copy(node, in_second.__getitem__)
        if node in plan.parted:
            in_second[node] = second.call_function(lowering.own_copy, (copied, scalar))
    outputs = _outputs(root, plan)
    crossing = [in_first[n] for n in plan.crossing]
    first.output((*crossing, *(in_first[n] for kind, n in outputs if kind == "first")))
    second.output(tuple(in_second[n] for kind, n in outputs if kind == "second"))
    for node in first.find_nodes(op="get_attr"):
        if not node.users:  # what the second part alone reads; a lookup takes a microsecond
            first.erase_node(node)
    parts = [fx.GraphModule(root, graph) for graph in (first, second)]
    for part in parts:
        part.meta[BOUND] = True  # its modes are as they should be; the backend need not warn of literals
    lowering.lower(parts[0])
    lowering.lower(parts[1], parts[1].graph.find_nodes(op="placeholder")[0])
    places: list[tuple[str, Any]] = []
    count = {"first": len(plan.crossing), "second": 0}
    for kind, value in outputs:
        places.append((kind, value if kind == "literal" else count[kind]))
        count[kind] = count.get(kind, 0) + 1
    own, drawn = (tuple(n in among for n in plan.crossing) for among in (plan.own, plan.drawn))
    return Parts(parts[0], parts[1], own, drawn, places)


def _outputs(root: fx.GraphModule, plan: Plan) -> list[tuple[str, Any]]:
    """Where each flat output comes from, with its node or literal."""
    returned: Sequence[Any] = root.graph.output_node().args[0]  # type: ignore[assignment]
    found: list[tuple[str, Any]] = []
    for value in returned:
        kind = "literal" if not isinstance(value, fx.Node) else "second" if value in plan.live else "first"
        found.append((kind, value))
    return found
