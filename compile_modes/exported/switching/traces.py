"""A program as the sequence of what it does: regions taken apart, values named by what they are.

Two exports of a model name their nodes, and cut their regions, as it happens. As a trace they can be compared op by op:
each op knows the regions that it is in, inputs are known by their place, state by its storage, constants by value.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from compile_modes import _compat
from compile_modes.exported.pairing import storage
from compile_modes.graph.finding import sites
from compile_modes.graph.ops import ModeOp, lookup
from compile_modes.graph.owners import canonical, module_path
from compile_modes.graph.view import attribute

aten = torch.ops.aten
# A region of these is a state that its ops run in, so that it may be cut anywhere.
_STATES = (torch.ops.higher_order.wrap_with_set_grad_enabled, torch.ops.higher_order.wrap_with_autocast)
_LAYOUT = aten.contiguous.default  # export leaves it out where the layout is right already
Context = tuple[Any, tuple[Any, ...]]  # the call of a region, and what it sets
Vector = Callable[[str], bool]  # the mode of each module


class Unmatched(Exception):
    """The programs can't be one graph: why, and of which modules the ops are that show it, if any do."""

    def __init__(self, why: str, owners: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.owners = frozenset(owners)


@dataclass(frozen=True)
class Input:
    """An input of the program."""

    index: int


@dataclass(frozen=True)
class Held:
    """A tensor, or another object, that the program holds; the same one in all programs that share it."""

    key: Any
    value: Any = field(compare=False)


@dataclass(frozen=True, eq=False)
class Graph:
    """The graph that a branch, a loop or a checkpoint runs, as it stands."""

    module: fx.GraphModule


@dataclass(eq=False)
class Op:
    """One op.

    Attributes:
        node: where it stands in its program.
        args, kwargs: its arguments, with values in the place of nodes.
        context: the regions around it, the outermost first.
        owner: the module whose ``forward`` ran it; of what only moves a buffer, the module that has the buffer.
        counter: the counter that steps beside a batch norm, if it does.
        seen: the modes under which it was exported, and the node that it was then.
    """

    node: fx.Node
    args: Any
    kwargs: Any
    context: tuple[Context, ...]
    owner: str
    counter: Held | None = None
    seen: list[tuple[Vector, fx.Node, bool]] = field(default_factory=list)

    @property
    def row(self) -> ModeOp | None:
        return lookup(self.node.target)

    @property
    def shape(self) -> Any:
        return getattr(_compat.value(self.node), "shape", None)

    @property
    def is_layout(self) -> bool:
        return self.node.target is _LAYOUT

    @property
    def passes_on(self) -> bool:
        """Whether it returns what it is given: a dropout in eval mode, or a change of layout."""
        row = self.row
        if not self.is_dropout or row is None or row.flag is None:
            return self.is_layout
        return row.read(self.node.args, dict(self.node.kwargs), row.flag) is False

    @property
    def is_dropout(self) -> bool:
        """Whether it is a dropout with a flag, and with no result but one."""
        row, target = self.row, self.node.target
        dropout = row is not None and row.family == "dropout" and row.flag is not None
        return dropout and isinstance(target, OpOverload) and len(target._schema.returns) == 1


@dataclass
class Trace:
    """A program: its module, what it does, what it returns, and the modes that it was exported in."""

    root: fx.GraphModule
    ops: list[Op]
    outputs: Any
    vector: Vector


def trace(root: fx.GraphModule, vector: Vector) -> Trace:
    """The trace of a program in training IR; ``root`` is the module of ``ep.module()``, with bodies of its own."""
    return _Tracer(root, vector).trace()


class _Tracer:
    def __init__(self, root: fx.GraphModule, vector: Vector) -> None:
        self.root, self.vector = root, vector
        found = sites(root)
        self.steps = {site.step for site in found if site.step is not None}
        self.counters: dict[fx.Node, Any] = {site.node: site.step.args[0] for site in found if site.step is not None}
        state = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        self.homes = {storage(t): canonical(name).rpartition(".")[0] for name, t in state}
        self.names: dict[Any, str] = {}  # of constants
        self.ops: list[Op] = []

    def trace(self) -> Trace:
        inputs = {node: Input(i) for i, node in enumerate(self.root.graph.find_nodes(op="placeholder"))}
        outputs = self.body(self.root, dict(inputs), ())
        for op in self.ops:
            op.seen.append((self.vector, op.node, op.counter is not None))
        return Trace(self.root, self.ops, outputs, self.vector)

    def body(self, module: fx.GraphModule, values: dict[fx.Node, Any], context: tuple[Context, ...]) -> Any:
        """Adds the ops of one graph; returns what it returns."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node] = self.held(attribute(module, str(node.target)), str(node.target))
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            elif node.op == "call_function" and node not in self.steps:
                values[node] = self.call(node, values, context)
            elif node in self.steps:
                values[node] = values[node.args[0]]
            elif node.op == "call_module" and node.target != _compat.GUARDS:
                raise Unmatched(f"{node.target} is a module of its own")
        raise AssertionError("a graph without an output")

    def call(self, node: fx.Node, values: dict[fx.Node, Any], context: tuple[Context, ...]) -> Any:
        given: Any = fx.map_arg(node.args, values.__getitem__)
        if node.target in _STATES:
            place = next(i for i, value in enumerate(given) if isinstance(value, Graph))
            module = given[place].module
            inside = dict(zip(module.graph.find_nodes(op="placeholder"), given[place + 1 :], strict=True))
            return self.body(module, inside, (*context, (node.target, tuple(given[:place]))))
        if isinstance(given[0] if given else None, tuple | list) and not isinstance(node.args[0], tuple | list):
            return given[0][given[1]]  # an item of what a region returned
        kwargs = dict(fx.map_arg(dict(node.kwargs), values.__getitem__))
        op = Op(node, _with_mode(node, given, kwargs), kwargs, context, self.owner(node, given))
        if node in self.counters:
            op.counter = values[self.counters[node]]
        self.ops.append(op)
        return given[0] if _is_in_place(node) else op  # one tensor, whichever op has written to it last

    def held(self, value: Any, name: str) -> Any:
        if isinstance(value, fx.GraphModule):
            return Graph(value)
        if not isinstance(value, torch.Tensor):
            return Held(("object", id(value)), value)
        if storage(value) in self.homes:
            return Held(("state", storage(value)), value)
        # Of two that are equal, one may be written. Those in the code of the model have other numbers in each program.
        home = "" if _compat.is_literal(name) else self.names.setdefault(storage(value), name)
        return Held(("constant", home, value.dtype, tuple(value.shape), value.device, _digest(value)), value)

    def owner(self, node: fx.Node, given: Any) -> str:
        """Copies of assigned buffers, at both ends of the program, belong to the module that assigns them."""
        path = module_path(node)
        if not path and node.target in (aten.copy_.default, aten.clone.default) and isinstance(given[0], Held):
            return self.homes.get(given[0].key[1], path) if given[0].key[0] == "state" else path
        return path


def _is_in_place(node: fx.Node) -> bool:
    """Whether a call returns its first operand, which it has written to."""
    if not isinstance(node.target, OpOverload) or len(node.target._schema.returns) != 1:
        return False
    returned, first = node.target._schema.returns[0].alias_info, node.target._schema.arguments[0].alias_info
    if returned is None or first is None or not first.is_write:
        return False
    return bool(returned.before_set == first.before_set)


def _with_mode(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments that reach to the mode, which may have been left out as a default."""
    row = lookup(node.target)
    name = (row.flag or row.p) if row is not None else None
    if row is None or name is None or name in kwargs:
        return args
    names = list(row.arguments)[len(args) : row.index(name) + 1]
    return (*args, *(kwargs.pop(name, row.default(name)) for name in names))


def _digest(value: torch.Tensor) -> Any:
    value = value.detach().cpu().contiguous()
    return hash(bytes(value.reshape(-1).view(torch.uint8).numpy())) if value.numel() else 0


def depth_of(name: str) -> int:
    """How many modules are above a module."""
    return name.count(".") + 1 if name else 0


def prefix(owner: str, depth: int) -> str:
    """The module around an owner that is so deep."""
    return ".".join(owner.split(".")[:depth])


def ancestors(owner: str) -> Iterator[str]:
    """A module and all around it, the innermost first."""
    for depth in range(depth_of(owner), -1, -1):
        yield prefix(owner, depth)


def values_of(arguments: Any) -> Iterator[Any]:
    """The values among arguments, in order."""
    if isinstance(arguments, tuple | list):
        for item in arguments:
            yield from values_of(item)
    elif isinstance(arguments, dict):
        yield from values_of(list(arguments.values()))
    elif is_value(arguments):
        yield arguments


def is_value(argument: Any) -> bool:
    return isinstance(argument, Input | Held | Op) or hasattr(argument, "is_phi")


def map_values(arguments: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments with other values."""
    if isinstance(arguments, tuple | list):
        mapped = [map_values(item, function) for item in arguments]
        return mapped if isinstance(arguments, list) else tuple(mapped)
    if isinstance(arguments, dict):
        return {name: map_values(item, function) for name, item in arguments.items()}
    return function(arguments) if is_value(arguments) else arguments
