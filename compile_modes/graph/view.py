"""One view of all graphs of a module: what they consist of, and where the values in them come from.

An exported module is not one graph: ``no_grad`` and autocast regions are higher-order ops with a body each, and an
UnflattenedModule has a graph per submodule. A :class:`Body` is one of these graphs with the node that runs it. A
:class:`View` holds them all, and an index for each question that is asked of their nodes. It is made once per request
and handed on; after an edit that changes what a node means, the next request makes another.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import fx, nn

from compile_modes import _compat
from compile_modes._compat import frames
from compile_modes.graph import calls
from compile_modes.graph.owners import canonical, dynamo_path, join, module_path

_K = TypeVar("_K")
_V = TypeVar("_V")
_T = TypeVar("_T")


class Index(dict[_K, _V], Generic[_K, _V]):
    """A dict that finds out what it does not know yet, so that nodes which are added later are in it too."""

    def __init__(self, find: Callable[[_K], _V]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: _K) -> _V:
        value = self[key] = self._find(key)
        return value


@dataclass(eq=False)
class Body:
    """One graph.

    Attributes:
        view: what the graph is part of.
        module: the module that owns the graph.
        path: attribute path of ``module`` from the root (``""`` for the root itself).
        parent: the body that runs this one, and ``caller`` the node there; both None for the root.
        always: whether the caller runs the body exactly once, so that a statement may be hoisted out of it.
        gated: whether it is, or is below, what a call of ``calls.py`` runs in train only.
        branch: whether it is, or is below, a branch of a switch.
        operands: what the caller passes for each placeholder, as far as known.
        children: the bodies that nodes of this graph run.
    """

    view: "View"
    module: nn.Module
    path: str = ""
    parent: "Body | None" = None
    caller: fx.Node | None = None
    always: bool = True
    gated: bool = False
    branch: bool = False
    operands: dict[fx.Node, Any] = field(default_factory=dict)
    children: dict[fx.Node, "Body"] = field(default_factory=dict)

    @property
    def runs_once(self) -> bool:
        """Whether a run of the root runs this graph exactly once, or, of a branch, not at all."""
        chosen = self.caller is not None and self.caller.target is calls.switch
        return (self.always or chosen) and (self.parent is None or self.parent.runs_once)

    @property
    def graph(self) -> fx.Graph:
        return cast(fx.Graph, self.module.graph)

    @property
    def inputs(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))


class View:
    """The graphs of a module, and what is known of their nodes.

    Attributes:
        root: the module.
        bodies: all of its graphs, the root's first, each after the one that runs it.
        by_graph: the body of each graph.
        owner: the path of the submodule whose ``forward`` ran a node; ``""`` for the root.
        state: the attribute path of the parameter or buffer that a value is; None if it is none.
        held: what a ``get_attr`` node reads; None if there is no such attribute.
        inputs: the placeholders of a body that are parameters or buffers, by path.
        reads: the ``get_attr`` node of a graph for an attribute of its module, by graph and target.
        head: the last of the nodes that a graph begins with and that compute nothing; None if it has none.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.bodies: list[Body] = []
        self.by_graph: dict[fx.Graph, Body] = {}
        self.owner: Index[fx.Node, str] = Index(module_path)
        self.state: Index[Any, str | None] = Index(self._state)
        self.held: Index[fx.Node, Any] = Index(self._held)
        self.inputs: Index[Body, dict[str, fx.Node]] = Index(self._inputs)
        self.reads: Index[fx.Graph, dict[str, fx.Node]] = Index(_reads)
        self.head: Index[fx.Graph, fx.Node | None] = Index(_head)
        self._found: dict[Any, Any] = {}
        self._visit(Body(self, root), set())
        self.main = self.bodies[0]

    def body(self, node: fx.Node) -> Body:
        """The graph that a node stands in."""
        return self.by_graph[node.graph]

    def run_by(self, node: fx.Node) -> list[Body]:
        """The graphs that a node runs."""
        return [body for body in self.bodies if body.caller is node]

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes of all graphs."""
        for body in self.bodies:
            yield from body.graph.nodes

    def once(self, find: Callable[..., _T], *about: Any) -> _T:
        """What a function finds out about this view, or a part of it, as it was when it was first asked for."""
        key = (find, *about)
        if key not in self._found:
            self._found[key] = find(*about)
        return cast(_T, self._found[key])

    def origin(self, value: Any) -> fx.Node | None:
        """The node of the root's graph that an operand in a body stands for, if the way up is known."""
        while isinstance(value, fx.Node) and (body := self.body(value)).parent is not None:
            value = body.operands.get(value)
        return value if isinstance(value, fx.Node) else None

    @functools.cached_property
    def from_dynamo(self) -> bool:
        """Whether the root's graph was captured under Dynamo, which says where its inputs come from."""
        return any(frames.source_name(node) for node in self.main.inputs)

    def _visit(self, body: Body, seen: set[nn.Module]) -> None:
        if body.module in seen:  # a body that two nodes run is one graph, with one mode
            return
        seen.add(body.module)
        self.bodies.append(body)
        self.by_graph[body.graph] = body
        turns: dict[str, int] = {}
        for node in body.graph.nodes:
            for child in _children(body, node, turns):
                if node.target is not calls.switch:  # which has two
                    body.children[node] = child
                self._visit(child, seen)

    def _held(self, node: fx.Node) -> Any:
        return attribute(self.body(node).module, str(node.target))

    def _inputs(self, body: Body) -> dict[str, fx.Node]:
        found: dict[str, fx.Node] = {}
        for placeholder in body.inputs:
            if (path := self.state[placeholder]) is not None:
                found.setdefault(path, placeholder)
        return found

    def _state(self, value: Any) -> str | None:
        body = self.by_graph.get(value.graph) if isinstance(value, fx.Node) else None
        while body is not None and isinstance(value, fx.Node):
            node: fx.Node = value
            if node.op == "get_attr":
                return canonical(join(body.path, str(node.target)))
            if node.op == "placeholder":
                operand = body.operands.get(node)
                if operand is None:
                    return dynamo_path(frames.source_name(node)) or None
                body, value = body.parent, operand
            elif calls.is_counter(node):  # returns the tensor that it advances
                value = node.args[0]
            else:
                body, value = _returned(body, node)
        return None


def attribute(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if there is none."""
    for name in path.split("."):
        if not hasattr(module, name):
            return None
        module = getattr(module, name)
    return module


def _reads(graph: fx.Graph) -> dict[str, fx.Node]:
    found: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), node)
    return found


def _head(graph: fx.Graph) -> fx.Node | None:
    head = None
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            break
        head = node
    return head


def _children(body: Body, node: fx.Node, turns: dict[str, int]) -> Iterator[Body]:
    if node.op == "call_module":
        target = str(node.target)
        module: Any = body.module.get_submodule(target)
        if hasattr(module, "call_modules"):  # unflatten's dispatcher: one graph per call, in turn
            turn = turns.get(target, 0)
            turns[target] = turn + 1
            module = module.call_modules()[turn]
        if isinstance(getattr(module, "graph", None), fx.Graph):
            child = Body(body.view, module, join(body.path, target), body, node)
            child.operands = dict(zip(child.inputs, node.args, strict=False))
            child.operands |= {p: node.kwargs[p.target] for p in child.inputs if p.target in node.kwargs}
            yield child
    elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        always, gate = node.target in _compat.UNCONDITIONAL_HOPS, node.target in calls.GATES
        for position, arg in enumerate(node.args):
            if isinstance(arg, fx.Node) and arg.op == "get_attr":
                module = attribute(body.module, str(arg.target))
                if isinstance(module, fx.GraphModule):
                    path = join(body.path, str(arg.target))
                    switch = node.target is calls.switch
                    child = Body(body.view, module, path, body, node, always, gate or body.gated)
                    child.branch = switch or body.branch
                    operands = [a for a in node.args[position + 1 :] if not isinstance(a, str)]  # a region's name
                    operands = list(node.args[3:]) if switch else operands
                    if (gate or switch or node.target in _compat.PASSING_HOPS) and len(child.inputs) == len(operands):
                        child.operands = dict(zip(child.inputs, operands, strict=True))
                    yield child


def _returned(body: Body, node: fx.Node) -> tuple[Body | None, Any]:
    """The value inside a child body that a call, or an item of its result, returns."""
    index = None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        index, node = node.args[1], node.args[0]
    child = body.children.get(node)
    if child is None:
        return None, None
    result: Any = child.graph.output_node().args[0]
    return child, result if index is None else result[index]
