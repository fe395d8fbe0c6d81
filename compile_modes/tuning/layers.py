"""The linear and convolution layers of a bound program, by weight and with their calls, and their adapters."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from compile_modes.graph.effects import named_arguments, viewed
from compile_modes.graph.ops import lookup
from compile_modes.graph.owners import join
from compile_modes.graph.view import Body, View, attribute

_ATEN = torch.ops.aten
ADD, MUL = _ATEN.add.Tensor, _ATEN.mul.Tensor
DROPOUT = _ATEN.dropout.default
LINEAR = _ATEN.linear.default
CONV = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)  # by dimensions
LORA_A, LORA_B, LORA_DROPOUT = "lora_A", "lora_B", "lora_dropout"

# What multiplies a value by a weight of two dimensions: the names of both in the schema.
_PRODUCTS: dict[Any, tuple[str, str]] = {
    LINEAR: ("input", "weight"),
    _ATEN.addmm.default: ("mat1", "mat2"),
    _ATEN.mm.default: ("self", "mat2"),
    _ATEN.matmul.default: ("self", "other"),
}
# Decompositions spell linear with one of these; without it, the weight is stored the other way round (GPT-2's Conv1D).
TRANSPOSES = {_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default}
_TRANSPOSED = {_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input}
_PADDED = {_ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding}
_CONVOLUTIONS = {*CONV, *_PADDED, *_TRANSPOSED, _ATEN.convolution.default}
_COMPUTED = "its weight is computed (by a parametrization, say), or out of reach inside a branch"


@dataclass(eq=False)
class Call:
    """One use of a layer: the graph, the node, and the name of the argument that it is called with."""

    body: Body
    node: fx.Node
    argument: str

    @property
    def x(self) -> fx.Node:
        """What the layer is called with now: an adapter in front of it makes that another node."""
        node: fx.Node = named_arguments(self.node)[self.argument]
        return node


@dataclass(eq=False)
class Layer:
    """A linear or a convolution layer, as the graph shows it.

    Attributes:
        name: where it is, and where its adapter goes: the module that holds the weight; for ``in_proj_weight``, one of
            several in a module, ``<module>.in_proj``. Of a module that is called by several names, the first.
        names: all of these names.
        weight: the attribute path of the weight, as the graph reads it.
        value: the weight.
        calls: the nodes that use it in this way.
        conv: whether it is a convolution.
        flipped: whether the weight of a linear is stored as (in, out).
        groups: those of a convolution.
        obstacle: why it can't have an adapter; empty if it can.
    """

    name: str
    weight: str
    value: torch.Tensor
    conv: bool
    flipped: bool
    groups: int = 1
    obstacle: str = ""
    calls: list[Call] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def features(self) -> tuple[int, int]:
        """How many channels go in and come out."""
        rows, columns = self.value.shape[:2]
        return (rows, columns) if self.flipped else (columns * self.groups, rows)


@dataclass(eq=False)
class Adapter:
    """The low-rank branch beside one call of a layer.

    Attributes:
        layer: the layer, and ``call`` the use of it.
        total: the node that adds the branch to the layer's result.
        scale: what the branch is multiplied by.
        nodes: all nodes of the branch, in order.
    """

    layer: Layer
    call: Call
    total: fx.Node
    scale: float
    nodes: list[fx.Node]


def layers(view: View) -> list[Layer]:
    """The layers of a view whose weights are parameters, in order of their first call, without those of adapters."""
    return view.once(_layers, view)


def adapters(view: View) -> list[Adapter]:
    """The adapters of a view, in graph order."""
    return view.once(_adapters, view)


def _layers(view: View) -> list[Layer]:
    found: dict[tuple[Any, ...], Layer] = {}
    names = _names(view.root)
    for body in view.bodies:
        for node in body.graph.nodes:
            layer = _layer_of(body, node, names)
            if layer is not None:
                first = found.setdefault(_identity(view.root, layer), layer)
                first.calls += layer.calls if first is not layer else []
                first.names += [layer.name] if layer.name not in first.names else []
    return list(found.values())


def _identity(root: nn.Module, layer: Layer) -> tuple[Any, ...]:
    """What a layer is known by: its weight and all that stands beside it. Several names of one module have the same."""
    path, _, leaf = layer.weight.rpartition(".")
    home = attribute(root, path) if path else root
    if leaf == "weight" and isinstance(here := attribute(root, layer.name), nn.Module):
        home = here  # export reads tied weights by one of their names
    state = [(name, id(t)) for name, t in {**home._parameters, **home._buffers}.items() if t is not None]
    return (layer.flipped, id(layer.value), leaf, *state)


def _layer_of(body: Body, node: fx.Node, names: dict[int, list[str]]) -> Layer | None:
    """The layer that a node is a call of, with this call; None if it is none."""
    conv = node.target in _CONVOLUTIONS
    if node.op != "call_function" or not (conv or node.target in _PRODUCTS):
        return None
    given = named_arguments(node)
    argument, weight = ("input", "weight") if conv else _PRODUCTS[node.target]
    x, operand = given.get(argument), given.get(weight)
    linear = node.target is LINEAR
    source, turned = operand, False
    if not conv and not linear and isinstance(operand, fx.Node) and operand.target in TRANSPOSES:
        source, turned = operand.args[0], True
    path = body.view.state[source]
    obstacle = ""
    if path is None and (path := body.view.state[viewed(source)]) is not None:
        obstacle = "its weight is a part of a packed one"
    owner = body.view.owner[node]
    if path is None and owner and isinstance(x, fx.Node) and (conv or linear):
        unknown = torch.empty(0, device="meta")
        return Layer(owner, join(owner, "weight"), unknown, conv, False, 1, _COMPUTED, [Call(body, node, argument)])
    value = attribute(body.view.root, path) if path is not None else None
    if not isinstance(x, fx.Node) or path is None or not isinstance(value, torch.Tensor):
        return None
    if not obstacle and not conv and value.ndim != 2:
        return None
    if node.target in _TRANSPOSED or given.get("transposed"):
        obstacle = "it is a transposed convolution"
    if not obstacle and not value.is_floating_point():
        obstacle = f"its weight is {value.dtype}"
    flipped = not (conv or linear or turned)
    name = _name(owner, path, names.get(id(value), []))
    groups = given.get("groups", 1) if conv else 1
    return Layer(name, path, value, conv, flipped, groups, obstacle, [Call(body, node, argument)])


def _names(root: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter and buffer: tied weights have several."""
    names: dict[int, list[str]] = {}
    for named in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
    return names


def _name(owner: str, path: str, names: Sequence[str]) -> str:
    """What a layer is called: by its own name of the weight, where export has read a tied one's other name."""
    own = [name for name in (path, *names) if name == join(owner, "weight")]
    below = [name for name in (path, *names) if name.startswith(f"{owner}.") or not owner]
    chosen = (own or below or [path])[0]
    home, _, leaf = chosen.rpartition(".")
    if leaf == "weight":
        return home
    return join(home, leaf.removesuffix("_weight") if leaf.endswith("_weight") else f"{leaf}_lora")


def _adapters(view: View) -> list[Adapter]:
    calls = {call.node: (layer, call) for layer in layers(view) for call in layer.calls}
    return [found for layer, call in calls.values() if (found := _adapter_of(layer, call, calls)) is not None]


def _adapter_of(layer: Layer, call: Call, calls: dict[fx.Node, tuple[Layer, Call]]) -> Adapter | None:
    """The adapter beside a call: ``call + b(a(dropout(x))) * scale``, with factors of the names that ``lora`` gives."""
    for total in call.node.users:
        if total.target is not ADD or len(total.args) != 2 or total.kwargs:
            continue
        scaled = next((arg for arg in total.args if arg is not call.node), None)
        if not isinstance(scaled, fx.Node) or scaled.target is not MUL or not isinstance(scaled.args[1], float | int):
            continue
        b: Any = scaled.args[0]
        if b not in calls or calls[b][0].name != join(layer.name, LORA_B):
            continue
        a = calls[b][1].x
        if a not in calls or calls[a][0].name != join(layer.name, LORA_A):
            continue
        x = calls[a][1].x
        dropped = [] if x is call.x else _dropout(x)  # what the layer gets may be a dropout's result too
        if x is call.x or (dropped and dropped[0].args[0] is call.x):
            return Adapter(layer, call, total, float(scaled.args[1]), [*dropped, a, b, scaled, total])
    return None


def _dropout(value: fx.Node) -> list[fx.Node]:
    """The nodes of the dropout that a value comes from, decomposed or not; none if it comes from something else."""
    inner = value.args[0] if value.target is operator.getitem else value
    row = lookup(inner.target) if isinstance(inner, fx.Node) and inner.op == "call_function" else None
    if row is None or row.family != "dropout":
        return []
    return [inner] if inner is value else [inner, value]  # type: ignore[list-item]


def base_layers(view: View) -> list[Layer]:
    """The layers that are not themselves a factor of an adapter."""
    factors = {join(adapter.layer.name, part) for adapter in adapters(view) for part in (LORA_A, LORA_B)}
    return [layer for layer in layers(view) if layer.name not in factors]
