"""What the nodes of a graph do that decides where it may be parted: draw random numbers, write, share memory."""

from typing import Any

from torch import fx

from compile_modes.graph.aliases import shared
from compile_modes.graph.effects import written_operands
from compile_modes.graph.flags import mode_of
from compile_modes.graph.ops import is_sampler, lookup
from compile_modes.graph.view import Body, View

RANDOM = frozenset({"dropout", "attention", "rnn", "rrelu", "noise", "switch"})  # families that draw numbers in train


class Memory:
    """Which values of a graph may share memory.

    Args:
        graph: a graph; nodes that are added to it later share with nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self.nodes = list(graph.nodes)
        for node in self.nodes:
            for operand in shared(node):
                self._parent[self.root(operand)] = self.root(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The same node for all values that may share memory."""
        while (parent := self._parent.get(node, node)) is not node:
            node = parent
        return node

    def members(self, root: fx.Node) -> list[fx.Node]:
        """The values with this root, in graph order."""
        return [node for node in self.nodes if self.root(node) is root]


def draws(view: View, node: fx.Node) -> bool:
    """Whether a node draws random numbers, itself or in a graph that it runs."""
    body = view.body(node)
    if node.op != "call_function":
        return False
    if (children := view.once(_bodies, view).get(node)) is not None:
        return any(draws(view, inner) for child in children for inner in child.graph.nodes)
    row = lookup(node.target)
    if row is None or row.family not in RANDOM:
        return is_sampler(node.target)
    training, _ = mode_of(body, node, row)
    p = row.read(node.args, dict(node.kwargs), row.p) if row.p is not None else None
    return training is not False and p != 0


def written(view: View, node: fx.Node) -> list[fx.Node]:
    """The values of its graph that a node writes to, itself or in a graph that it runs."""
    found = [value for value in written_operands(node) if isinstance(value, fx.Node)]
    row = lookup(node.target)
    if row is not None and row.stats and mode_of(view.body(node), node, row)[0] is not False:
        statistics = (row.read(node.args, dict(node.kwargs), name) for name in row.stats)  # of which schemas don't tell
        found += [value for value in statistics if isinstance(value, fx.Node)]
    for child in view.once(_bodies, view).get(node, ()):
        memory = view.once(Memory, child.graph)
        roots = {memory.root(value) for inner in child.graph.nodes for value in written(view, inner)}
        inputs = [member for root in roots for member in memory.members(root) if member.op == "placeholder"]
        found += [operand for i in inputs if isinstance(operand := child.operands.get(i), fx.Node)]
    return found


def _bodies(view: View) -> dict[Any, list[Body]]:
    found: dict[Any, list[Body]] = {}
    for body in view.bodies[1:]:
        found.setdefault(body.caller, []).append(body)
    return found
