"""What a part of a graph calls in place of ops that ``torch.func.vmap`` has no rule for."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from compile_modes import _compat
from compile_modes.forms.recurrent import lstm_in_steps
from compile_modes.graph.ops import lookup
from compile_modes.graph.view import View
from compile_modes.sampling.effects import draws


def own_copy(value: Tensor, repetition: Tensor) -> Tensor:
    """A copy of a value for each repetition.

    Args:
        value: of any shape.
        repetition: a boolean scalar, under vmap one for each repetition.
    """
    return torch.where(repetition.to(value.device), value, value)


def with_grad_mode(enabled: bool, body: nn.Module, *operands: Any) -> Any:
    """A region in a grad mode of its own; in none if there are no gradients around it."""
    with torch.set_grad_enabled(enabled and torch.is_grad_enabled()):
        return body(*operands)


def with_autocast(
    device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None, body: nn.Module, *operands: Any
) -> Any:
    """A region under autocast, or out of it."""
    with torch.autocast(device, dtype, enabled, cache):
        return body(*operands)


def checkpointed(body: nn.Module, *operands: Any, **_: Any) -> Any:
    """A region whose values were not to be kept for the backward pass: it is the same with them."""
    return body(*operands)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer. Under autocast, vmap would add a bias of the weight's dtype, and give results of that."""
    y = nn.functional.linear(x, weight)
    return y + bias.to(y.dtype)


def rrelu(x: Tensor, lower: float, upper: float, training: bool) -> Tensor:
    """RReLU: in train, slopes are uniform in [lower, upper), one for each value; in eval, their mean.

    As ``_rrelu_with_noise_train`` in ``aten/src/ATen/native/Activation.cpp``.
    """
    slope: Any = torch.empty_like(x).uniform_(lower, upper) if training else (lower + upper) / 2
    return torch.where(x <= 0, x * slope, x)


_REGIONS = dict(zip(_compat.UNCONDITIONAL_HOPS, (with_grad_mode, with_autocast, checkpointed), strict=True))


def lower(part: fx.GraphModule, repetition: fx.Node | None = None) -> None:
    """Puts the calls of this file into a graph and all graphs that it runs.

    Args:
        part: the graph.
        repetition: its boolean scalar, if it runs once per repetition. Regions get it, too: a tensor that one makes of
            nothing, to fill it with random numbers, has to be there for each repetition.
    """
    view = View(part)
    around = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    casts = repetition is not None and (around or any(node.target is _compat.AUTOCAST for node in view.nodes()))
    _hand_down(view, repetition)
    for body in view.bodies:
        for node in list(body.graph.nodes):
            if node.op != "call_function":
                continue
            row = lookup(node.target)
            if node.target in _REGIONS:
                node.target = _REGIONS[node.target]
            elif row is not None and row.family == "rnn" and not draws(view, node):
                node.target = _steps(node.target)
            elif node.target is torch.ops.aten.linear.default and casts and tuple(node.args[2:]) not in ((), (None,)):
                node.target = linear
            elif row is not None and row.family == "rrelu":
                _write_out(node, row)
    for body in reversed(view.bodies):
        if isinstance(body.module, fx.GraphModule):
            body.module.recompile()


def _steps(target: Any) -> Any:
    """A recurrent op without dropout in steps, if there are any for it; vmap refuses those on packed sequences."""
    return lstm_in_steps if target is torch.ops.aten.lstm.input else _compat.in_steps(target) or target


def _hand_down(view: View, repetition: fx.Node | None) -> None:
    known = {view.main: repetition}
    for body in view.bodies[1:]:  # after those that run them
        caller, above = body.caller, known.get(body.parent) if body.parent is not None else None
        if caller is None or above is None or caller.target not in _REGIONS or not draws(view, caller):
            continue
        made = [n for n in body.graph.nodes if n.op == "call_function" and not n.all_input_nodes]
        with body.graph.inserting_after(body.inputs[-1] if body.inputs else body.graph._root):
            own = known[body] = body.graph.placeholder("repetition")
        caller.args = (*caller.args, above)
        for node in made:
            if isinstance(_compat.value(node), Tensor) and not draws(view, node):
                with body.graph.inserting_after(node):
                    copied = body.graph.call_function(own_copy, (node, own))
                node.replace_all_uses_with(copied, delete_user_cb=lambda user, by=copied: user is not by)


def _write_out(node: fx.Node, row: Any) -> None:
    """Replaces an RReLU, or a part of one, by its formula."""
    names = ("self", "lower", "upper", "training")
    if all(row.has(name) for name in names) and len(row.overload._schema.returns) == 1:
        arguments = tuple(row.read(node.args, dict(node.kwargs), name) for name in names)
        with node.graph.inserting_before(node):
            computed = node.graph.call_function(rrelu, arguments)
            if row.overload._schema.is_mutable:
                computed = node.graph.call_function(torch.ops.aten.copy_.default, (arguments[0], computed))
        node.replace_all_uses_with(computed)
        node.graph.erase_node(node)
