"""Batch norms in eval right behind convolutions: computed by the convolution, with weights that fold to constants."""

from typing import Any

import torch
from torch import fx

from compile_modes import _compat

_aten = torch.ops.aten
_CONVOLUTIONS = frozenset({_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default})


def into_convolutions(graph: fx.Graph, weights: set[fx.Node]) -> int:
    """Moves each batch norm in eval into the convolution before it, if all that both read are weights.

    The arithmetic on weights is part of the graph, and left to Inductor to fold: ``w * s`` and
    ``(b - mean) * s + beta`` with ``s = gamma * rsqrt(var + eps)``. Declines where the convolution has another user, or
    a dtype isn't float32.

    Returns:
        How many were moved.
    """
    found = 0
    for norm in graph.find_nodes(op="call_function", target=_aten.batch_norm.default):
        conv = norm.args[0]
        operands = [*norm.args[1:5], *conv.args[1:3]] if conv.target in _CONVOLUTIONS and len(conv.users) == 1 else [0]
        tensors = [operand for operand in operands if operand is not None]
        if norm.args[5] or not weights.issuperset(tensors) or None in norm.args[3:5]:
            continue
        if all(_compat.value(tensor).dtype == torch.float32 for tensor in (conv.args[0], *tensors)):
            _move(graph, conv, norm)
            found += 1
    return found


def _move(graph: fx.Graph, conv: fx.Node, norm: fx.Node) -> None:
    _, gamma, beta, mean, var = norm.args[:5]
    weight: Any = conv.args[1]
    bias = conv.args[2] if len(conv.args) > 2 else None
    shape = [-1, *[1] * (_compat.value(weight).dim() - 1)]
    with graph.inserting_before(conv):

        def call(target: Any, *args: Any) -> fx.Node:
            return graph.call_function(target, args)

        scale = call(_aten.rsqrt.default, call(_aten.add.Tensor, var, norm.args[7]))
        if gamma is not None:
            scale = call(_aten.mul.Tensor, gamma, scale)
        shift = call(_aten.neg.default, mean) if bias is None else call(_aten.sub.Tensor, bias, mean)
        shift = call(_aten.mul.Tensor, shift, scale)
        if beta is not None:
            shift = call(_aten.add.Tensor, shift, beta)
        scaled = call(_aten.mul.Tensor, weight, call(_aten.view.default, scale, shape))
    conv.args = (conv.args[0], scaled, shift, *conv.args[3:])
    norm.replace_all_uses_with(conv)
    graph.erase_node(norm)
