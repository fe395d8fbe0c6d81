"""Regions: nodes that train mode runs and eval mode leaves out, found in a train graph and folded into one node.

Dropout carries its mode in an argument. Other things that differ by mode are several nodes of a train export and none
of an eval one: the random mask of DropPath, StochasticDepth or DropBlock, and the power iteration of spectral norm.
Folded (``folding.py``), they are the body of one call with a flag (``calls.py``), which the table of ops knows.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from compile_modes import _compat
from compile_modes._compat import value
from compile_modes.graph import calls, sizes
from compile_modes.graph.ops import is_sampler, lookup
from compile_modes.graph.view import Body

aten = torch.ops.aten
# What a random mask is applied with; random numbers that meet the model's values in any other op are no mask.
_MIXING = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        **dict.fromkeys(("mul", "mul_", "div", "div_", "add", "add_", "sub", "sub_"), ("Tensor",)),
        "where": ("self", "ScalarOther", "ScalarSelf"),
        "masked_fill": ("Scalar", "Tensor"),
    }.items()
    for overload in overloads
)
_ADDING = frozenset(getattr(aten, name).Tensor for name in ("add", "add_", "sub", "sub_"))
_SCALING = frozenset({aten.div.Tensor, aten.mul.Tensor})
# These use the shape of their operand only; a mask is often filled into one of them.
_SHAPED = frozenset(
    getattr(aten, name).default
    for name in ("new_empty", "new_ones", "new_zeros", "new_full", "empty_like", "ones_like", "zeros_like", "full_like")
) | {aten.rand_like.default, aten.randn_like.default, aten.bernoulli.p}
_VIEWS = frozenset(
    {
        aten.t.default, aten.matrix_H.default, aten.reshape.default, aten.view.default, aten.flatten.using_ints,
        aten.permute.default, aten.transpose.int, aten.clone.default,
    }
)  # fmt: skip
# All that power iterations consist of (torch/nn/utils/spectral_norm.py, torch/nn/utils/parametrizations.py).
_ITERATION = _VIEWS | {
    aten.mv.default, aten.linalg_vector_norm.default, aten.clamp_min_.default, aten.clamp_min.default,
    aten.expand_as.default, aten.div.Tensor, aten.div.out, aten.copy_.default,
}  # fmt: skip
_INNER_PRODUCTS = frozenset({aten.dot.default, aten.vdot.default})


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes of a train graph that eval leaves out.

    Attributes:
        gate: the function of ``calls.py`` that the folded call calls.
        nodes: in graph order; the folded call takes the place of the first.
        results: pairs of a node whose value is used outside, and the operand that is used instead in eval.
        operands: what the nodes take from outside, the operands of ``results`` first.
        sizes: nodes in the midst of ``nodes`` that compute sizes, for ``operands`` or others, to be had before them.
        covers: whether the module in whose ``forward`` the nodes stand consists of nothing else, so that their mode can
            only be that module's. Otherwise, nothing but an eval export that lacks them tells that they have a mode.
    """

    gate: Any
    nodes: tuple[fx.Node, ...]
    results: tuple[tuple[fx.Node, fx.Node], ...]
    operands: tuple[fx.Node, ...]
    covers: bool
    sizes: tuple[fx.Node, ...] = ()

    @property
    def node(self) -> fx.Node:
        """The node that stands for the region."""
        return self.results[0][0]


def regions(body: Body) -> list[Region]:
    """The regions of one graph that were not folded when its view was made, in graph order."""
    return body.view.once(_regions, body)


def _regions(body: Body) -> list[Region]:
    order = {node: index for index, node in enumerate(body.graph.nodes)}
    found = [region for node in samplers(body) if (region := _mask(body, node, order)) is not None]
    masks = _owned(body, found)
    iterations = [region for node in order if (region := _power_iteration(body, node)) is not None]
    return sorted([*masks, *iterations], key=lambda region: order[region.nodes[0]])


def samplers(body: Body) -> list[fx.Node]:
    """The nodes that draw random numbers and have no mode, themselves or in a no_grad or autocast region below."""
    return body.view.once(_samplers, body)


def _samplers(body: Body) -> list[fx.Node]:
    return [node for node in body.graph.nodes if _samples(body, node)]


def _samples(body: Body, node: fx.Node) -> bool:
    if node.target not in _compat.UNCONDITIONAL_HOPS:
        return is_sampler(node.target)
    child = body.children.get(node)
    return child is not None and any(_samples(child, n) and not lookup(n.target) for n in child.graph.nodes)


def iterations(body: Body) -> list[tuple[fx.Node, bool]]:
    """Where spectral norm uses its two vectors as they are, or (True) as an iteration outside of a region left them."""
    found = []
    for node in body.graph.nodes:
        if node.target in _INNER_PRODUCTS:
            u, product = node.args
            if isinstance(product, fx.Node) and product.target is aten.mv.default:
                vectors = [_behind_views(u), _behind_views(product.args[1])]
                if all(body.view.state[_written(vector)] is not None for vector in vectors):
                    found.append((node, any("out" in vector.kwargs for vector in vectors)))
    if not found and body.parent is None:  # a graph break may part the iteration from the use
        found = [(node, True) for node in body.graph.nodes if _normalises(body, node)]
    return found


def _normalises(body: Body, node: fx.Node) -> bool:
    """Whether a node writes a normalised product into a buffer."""
    product = node.args[0] if node.target is aten.div.out else None
    made = isinstance(product, fx.Node) and product.target is aten.mv.default
    return made and body.view.state[_written(node)] is not None


def _inputs(body: Body, node: fx.Node) -> list[fx.Node]:
    """The tensors that a node takes: neither sizes nor the graphs of regions."""
    inputs = []
    for n in node.all_input_nodes:
        held = body.view.held[n] if n.op == "get_attr" else None
        if not sizes.is_scalar(n) and (n.op != "get_attr" or isinstance(held, torch.Tensor)):
            inputs.append(n)
    return inputs


def _metadata(node: fx.Node) -> Any:
    x = value(node)
    return (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else None


def _behind_views(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _mask(body: Body, sampler: fx.Node, order: dict[fx.Node, int]) -> Region | None:
    """The region around one sampler: what is made of its numbers alone, and the nodes that apply it to a value."""
    drawn: set[fx.Node] = {sampler}
    for node in _inputs(body, sampler):
        made: set[fx.Node] = set()
        if _constant(body, node, made):
            drawn |= made
        elif sampler.target not in _SHAPED:
            return None  # drawn from values of the model
    applied: list[fx.Node] = []
    x: fx.Node | None = None
    queue = {order[user]: user for node in drawn for user in node.users if user not in drawn}
    while queue:
        node = queue.pop(min(queue))
        if sizes.is_size_of_region(body, node):
            continue
        inputs = _inputs(body, node)
        outer = [n for n in inputs if n not in drawn and n not in applied]
        if node.op == "call_function" and all(n in drawn for n in inputs):
            drawn.add(node)
            queue |= {order[user]: user for user in node.users}
        elif node.target in _MIXING and len(outer) == (0 if applied else 1):
            x = outer[0] if outer else x
            applied.append(node)
        else:
            return None
    if x is None or any(user not in applied for node in applied[:-1] for user in node.users):
        return None
    x, scaling = _before_scaling(body, x, sampler, drawn)
    applied += _scaled_after(body, applied[-1], drawn)
    nodes = {*drawn, *applied, *scaling}
    region = _region(body, nodes, applied[-1], x, order)
    return region if _metadata(applied[-1]) == _metadata(x) else None


def _constant(body: Body, node: fx.Node, drawn: set[fx.Node]) -> bool:
    """Whether a value depends on no other value but for its shape; collects the nodes that make it."""
    if node.op != "call_function":
        return False
    drawn.add(node)
    return node.target in _SHAPED or all(_constant(body, n, drawn) for n in _inputs(body, node))


def _before_scaling(body: Body, x: fx.Node, sampler: fx.Node, drawn: set[fx.Node]) -> tuple[fx.Node, set[fx.Node]]:
    """Goes back over an ``x / keep_prob`` that belongs to a mask of that probability."""
    floats, owner = _floats(drawn), body.view.owner
    if x.target in _SCALING and x.args[1] in floats and len(x.users) == 1 and owner[x] == owner[sampler]:
        return x.all_input_nodes[0], {x}
    return x, set()


def _scaled_after(body: Body, masked: fx.Node, drawn: set[fx.Node]) -> list[fx.Node]:
    """The ``/ keep_prob`` behind ``x * mask``, if the mask was drawn with that probability, or with one minus it."""
    after = next(iter(masked.users), masked)
    scaled = after.target in _SCALING and len(masked.users) == 1 and after.args[0] is masked
    if not scaled or body.view.owner[after] != body.view.owner[masked]:
        return []
    floats, keep = _floats(drawn), after.args[1]
    if isinstance(keep, fx.Node):  # floats are inputs of the graph, with ``dynamic=True``
        return [after] if keep in floats or (keep.target is operator.sub and keep.args[1] in floats) else []
    if not isinstance(keep, float) or not keep:
        return []
    keep = keep if after.target is aten.div.Tensor else 1 / keep
    near = [p for p in floats if isinstance(p, float) and (math.isclose(p, keep) or math.isclose(p, 1 - keep))]
    return [after] if near else []


def _floats(nodes: set[fx.Node]) -> set[Any]:
    """The numbers, and nodes that compute some, among the arguments of nodes."""
    return {a for n in nodes for a in n.args if isinstance(value(a) if isinstance(a, fx.Node) else a, sizes.FLOATS)}


def _region(body: Body, nodes: set[fx.Node], end: fx.Node, x: fx.Node, order: dict[fx.Node, int]) -> Region | None:
    """A mask that may be run in one piece, where its first node stands; None if that would change anything."""
    ordered = sorted(nodes, key=order.__getitem__)
    leaving = [user for node in ordered if node is not end for user in node.users if user not in nodes]
    if not all(sizes.is_size_of_region(body, node) for node in leaving):
        return None
    outer = [n for node in ordered for n in node.all_input_nodes if n not in nodes and not _held(body, n)]
    operands = tuple(dict.fromkeys([x, *outer]))
    late = sizes.late(body, [*operands, *leaving], order[ordered[0]], order)
    if late is None:
        return None
    between = list(order)[order[ordered[0]] : order[ordered[-1]]]
    if any(n not in nodes and (_samples(body, n) or lookup(n.target)) for n in between):
        return None  # would draw its random numbers before or after the region instead of in its midst
    return Region(calls.noise, tuple(ordered), ((end, x),), operands, covers=False, sizes=late)


def _held(body: Body, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(body.view.held[node], fx.GraphModule)


def _owned(body: Body, masks: list[Region]) -> Iterator[Region]:
    """Tells which masks are all that their module computes."""
    if not masks:
        return
    inside = {node for mask in masks for node in mask.nodes}
    mixed_in = {
        body.view.owner[node]
        for node in body.graph.nodes
        if node.op == "call_function" and node not in inside and isinstance(value(node), torch.Tensor)
    }
    for mask in masks:
        # Added noise is more often there in both modes than not.
        masks_x = not any(node.target in _ADDING for node in mask.nodes if mask.results[0][1] in node.all_input_nodes)
        alone = bool(mask.node.meta.get("nn_module_stack")) and body.view.owner[mask.node] not in mixed_in
        yield replace(mask, covers=alone and masks_x)


def _power_iteration(body: Body, call: fx.Node) -> Region | None:
    """A no_grad region that does nothing but replace two buffers by normalised products of a matrix and the other."""
    child = body.children.get(call)
    if child is None or call.target not in _compat.UNCONDITIONAL_HOPS:
        return None
    computed = [node for node in child.graph.nodes if node.op == "call_function"]
    if not any(n.target is aten.mv.default for n in computed) or any(n.target not in _ITERATION for n in computed):
        return None
    results: list[tuple[fx.Node, fx.Node]] = []
    outputs: Any = child.graph.output_node().args[0]
    for user in call.users:
        if user.target is not operator.getitem:
            return None
        vector = _written(outputs[user.args[1]])
        operand = child.operands.get(vector) if vector is not None else None
        if operand is None or body.view.state[operand] is None:
            return None
        results.append((user, operand))
    if not results:
        return None
    values = [n for n in call.all_input_nodes if n in child.operands.values()]
    operands = tuple(dict.fromkeys([*(operand for _, operand in results), *values]))
    return Region(calls.power_iteration, (call, *call.users), tuple(results), operands, covers=True)


def _written(value: Any) -> fx.Node | None:
    """The vector into which a value of a power iteration was written."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        written_to = value.args[0] if value.target in (aten.clone.default, aten.copy_.default) else None
        value = value.kwargs.get("out", written_to)
    return value if isinstance(value, fx.Node) else None
