"""Compares the train export of a model with its eval export, to learn what one of them can't tell.

From one export, a flag that follows ``training`` and a literal ``True`` look alike. From both they don't: a site that
is (train, eval) follows its owner, (train, train) and (eval, eval) are hard-coded, (eval, train) is inverted. Whatever
else the two programs differ in is Python's doing, and takes both of them.
"""

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from compile_modes.graph.effects import has_effect, named_arguments
from compile_modes.graph.finding import find
from compile_modes.graph.ops import lookup
from compile_modes.graph.owners import module_path
from compile_modes.graph.regions import Region, regions
from compile_modes.graph.sites import Site
from compile_modes.graph.view import Body, View

Tokens = dict[fx.Node, Any]
# Export leaves these out where the layout is right already, which may depend on the kernel that a mode chooses.
_LAYOUT = frozenset({torch.ops.aten.contiguous.default})


@dataclass
class Pairing:
    """What both exports together say of the train program.

    Attributes:
        bound: sites that follow their owner's flag.
        fixed: sites that are in the same mode whatever the flag.
        inverted: sites that are in eval when their owner trains, with the probability that the train export has lost.
        left_out: the regions that eval lacks.
        kept_steps, left_out_steps: steps of counters that both modes take, and that eval doesn't.
        difference: what else differs, and where; empty if one graph with flags can be both.
    """

    bound: list[fx.Node] = field(default_factory=list)
    fixed: list[fx.Node] = field(default_factory=list)
    inverted: dict[fx.Node, float | None] = field(default_factory=dict)
    left_out: list[tuple[Region, Body]] = field(default_factory=list)
    kept_steps: set[fx.Node] = field(default_factory=set)
    left_out_steps: set[fx.Node] = field(default_factory=set)
    difference: str = ""

    @property
    def unclear(self) -> str:
        """What only train has and may be decided by a module further out than its own; empty if there is nothing."""
        regions = [region for region, _ in self.left_out if not region.covers]
        return _describe(regions[0].nodes[0], None) if regions else ""

    def copy(self) -> "Pairing":
        return Pairing(**{name: copy.copy(value) for name, value in vars(self).items()})


class _Differ(Exception):
    """The programs differ in more than modes."""


def pair(train: nn.Module, evaluation: nn.Module) -> Pairing:
    """Walks both exports of a model side by side. Neither is edited.

    Args:
        train, evaluation: the GraphModules of ``ep.module()``, which share their parameters and buffers.
    """
    walk = _Walk(train, evaluation)
    try:
        walk.programs()
    except _Differ as difference:
        return Pairing(difference=str(difference))
    return walk.found


class _Walk:
    """A comparison in progress.

    Every value has a token, which is equal in both programs if the value is. What one of them leaves out has the token
    of what stands in for it: a dropout that eval lacks is its own input there.
    """

    def __init__(self, train: nn.Module, evaluation: nn.Module) -> None:
        self.found = Pairing()
        self.views = View(train), View(evaluation)
        self.sites = [{s.node: s for s in find(view) if lookup(s.node.target)} for view in self.views]
        self.steps = {site.step for site in self.sites[0].values() if site.step is not None}
        self.tokens: tuple[Tokens, Tokens] = ({}, {})
        self.children = [_children(view) for view in self.views]
        keys = [{storage(t) for t in _tensors(view)} for view in self.views]
        self.shared = keys[0] & keys[1]

    def programs(self) -> None:
        if different := structure_that_differs(*(view.main.graph for view in self.views)):
            raise _Differ(different)
        self.graphs(self.views[0].main, self.views[1].main)

    def graphs(self, train: Body, evaluation: Body) -> None:
        """Pairs all nodes of two graphs, in order."""
        pending = (deque(self.computing(0, train)), deque(self.computing(1, evaluation)))
        starts = {region.nodes[0]: region for region in regions(train)}
        skipped: set[fx.Node] = set()
        while pending[0] or pending[1]:
            a, b = (queue[0] if queue else None for queue in pending)
            if a in skipped:
                pending[0].popleft()
            elif a is not None and b is not None and self.match(a, b):
                pending[0].popleft()
                pending[1].popleft()
            elif a in starts:
                self.leave_out(starts[a], train)
                skipped.update(starts[a].nodes)
            elif a is not None and self.erase(0, a, train.module):
                pending[0].popleft()
            elif b is not None and self.erase(1, b, evaluation.module):
                pending[1].popleft()
            else:
                raise _Differ(_describe(a, b))
        if self.value(0, train.graph.output_node().args[0]) != self.value(1, evaluation.graph.output_node().args[0]):
            raise _Differ(f"the outputs of {train.path or 'the program'}")

    def computing(self, side: int, body: Body) -> Iterator[fx.Node]:
        """The nodes that compute something; gives the others their tokens."""
        inputs = body.graph.find_nodes(op="placeholder")
        for index, node in enumerate(inputs):
            operand = body.operands.get(node)
            self.tokens[side][node] = ("input", index) if operand is None else self.value(side, operand)
        for node in body.graph.nodes:
            if node.op == "get_attr":
                self.tokens[side][node] = self.held(body.view.held[node])
            elif node.op == "call_function" or (node.op == "call_module" and node.target != "_guards_fn"):
                yield node

    def held(self, value: Any) -> Any:
        """The token of an attribute: shared state is known by its storage, a constant by its value."""
        if isinstance(value, fx.GraphModule):
            return "graph"  # compared where it is called
        if not isinstance(value, torch.Tensor):
            return value
        return storage(value) if storage(value) in self.shared else _Constant(value)

    def value(self, side: int, value: Any) -> Any:
        """An argument with tokens for nodes, comparable with ``==``."""
        if isinstance(value, fx.Node):
            return self.tokens[side].get(value, (side, value))
        if isinstance(value, list | tuple):
            return tuple(self.value(side, v) for v in value)
        if isinstance(value, dict):
            return {key: self.value(side, v) for key, v in value.items()}
        return (type(value), value) if isinstance(value, bool | int | float) else value

    def match(self, a: fx.Node, b: fx.Node) -> bool:
        """Pairs two nodes that compute the same but for their mode; False if they don't."""
        sides = [self.sites[side].get(node) for side, node in enumerate((a, b))]
        if a.op != b.op or a.target != b.target or (sides[0] is None) != (sides[1] is None):
            return False
        called = [self.children[side].get(node, []) for side, node in enumerate((a, b))]
        by_operand = bool(called[0]) and all(child.operands for children in called for child in children)
        if by_operand:  # what is passed may differ: a counter, say, that only one mode needs
            if [v for v in a.args if not isinstance(v, fx.Node)] != [v for v in b.args if not isinstance(v, fx.Node)]:
                return False
        elif self.arguments(0, a) != self.arguments(1, b):
            return False
        if sides[0] is not None and sides[1] is not None and not self.decide(sides[0], sides[1]):
            return False
        if len(called[0]) != len(called[1]) or not all(map(self.attempt, *called)):
            return False
        if a in self.steps:
            self.found.kept_steps.add(a)
        # In eval, a dropout returns the very tensor that it was given. Later uses of either are recorded as uses of the
        # dropout, so the two must not be told apart where they are the same.
        identity = sides[1] is not None and sides[1].op.family == "dropout" and sides[1].training is False
        single = identity and not a.target._schema.returns[1:]  # type: ignore[union-attr]
        self.tokens[0][a] = self.value(0, a.args[0]) if single else ("value", a)
        self.tokens[1][b] = self.tokens[0][a]
        return True

    def attempt(self, train: Body, evaluation: Body) -> bool:
        """Pairs the graphs that two calls run; leaves no trace if it can't."""
        before = (
            tuple(dict(tokens) for tokens in self.tokens),
            Pairing(**{k: v.copy() for k, v in vars(self.found).items() if k != "difference"}),
        )
        try:
            self.graphs(train, evaluation)
        except _Differ:
            self.tokens, self.found = before[0], before[1]  # type: ignore[assignment]
            return False
        return True

    def arguments(self, side: int, node: fx.Node) -> Any:
        """All arguments of a call but its mode."""
        row = lookup(node.target)
        if not isinstance(node.target, OpOverload):
            return self.value(side, node.args), self.value(side, dict(node.kwargs))
        schema = node.target._schema.arguments
        given = self.value(side, named_arguments(node))
        complete = {a.name: given.get(a.name, self.value(side, a.default_value)) for a in schema}
        if row is not None:
            complete.pop(row.flag or row.p or "", None)
        # The same op of another module is decided by another one: both of them may run, or neither.
        return complete | {"owner": self.views[side].owner[node]}

    def decide(self, a: Site, b: Site) -> bool:
        """Notes what a pair of sites says; False if their probabilities differ by mode."""
        if a.modeless or a.training is None or b.training is None:
            return a.modeless == b.modeless and a.training == b.training
        if a.op.flag is None and a.p and b.p and a.p != b.p:
            return False
        if a.training is b.training:
            if a.op.flag is not None or a.training:  # attention without dropout has no mode in either
                self.found.fixed.append(a.node)
        elif a.training:
            self.found.bound.append(a.node)
        else:
            self.found.inverted[a.node] = b.p if a.op.flag is None else None
        return True

    def erase(self, side: int, node: fx.Node, module: nn.Module) -> bool:
        """Lets a node that only one mode has stand for its input, if it does nothing in the other; False if it does."""
        site = self.sites[side].get(node)
        dropout = site is not None and site.op.family == "dropout" and site.training is (side == 0)
        if dropout and not node.target._schema.returns[1:]:  # type: ignore[union-attr]
            if side == 0:
                self.found.bound.append(node)
        elif node not in self.steps and node.target not in _LAYOUT and (node.users or has_effect(module, node)):
            return False
        if node in self.steps:
            self.found.left_out_steps.add(node)
        self.tokens[side][node] = self.value(side, node.args[0] if node.args else None)
        return True

    def leave_out(self, region: Region, body: Body) -> None:
        self.found.left_out.append((region, body))
        for node, operand in region.results:
            self.tokens[0][node] = self.tokens[0][operand]


def structure_that_differs(first: fx.Graph, second: fx.Graph) -> str:
    """What two programs take or return in another structure; empty if nothing."""
    specs = [getattr(graph._codegen, "pytree_info", None) for graph in (first, second)]
    for name, what in (("in_spec", "the structure of the inputs"), ("out_spec", "the structure of the outputs")):
        if None not in specs and getattr(specs[0], name) != getattr(specs[1], name):
            return what
    return ""


class _Constant:
    """A tensor that compares by value."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant):
            return False
        a, b = self.value, other.value
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]


def _children(view: View) -> dict[fx.Node, list[Body]]:
    called: dict[fx.Node, list[Body]] = {}
    for body in view.bodies:
        if body.caller is not None:
            called.setdefault(body.caller, []).append(body)
    return called


def _tensors(view: View) -> list[torch.Tensor]:
    held = [view.held[node] for body in view.bodies for node in body.graph.find_nodes(op="get_attr")]
    return [value for value in held if isinstance(value, torch.Tensor)]


def storage(tensor: torch.Tensor) -> Any:
    """What tells a parameter or buffer from another one."""
    return tensor.data_ptr() or id(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _describe(a: fx.Node | None, b: fx.Node | None) -> str:
    train, evaluation = (f"{n.target} (owner {module_path(n)!r})" if n is not None else "nothing more" for n in (a, b))
    return f"{train} in train, {evaluation} in eval"
