"""Which graphs can run on constants, which can't, and what the latter write to."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from compile_modes import _compat
from compile_modes._compat import freezing
from compile_modes.graph.effects import has_effect, viewed, written_operands
from compile_modes.graph.sites import Site
from compile_modes.graph.view import Body, View


@dataclass(frozen=True)
class Eligibility:
    """What a graph is for the deploy form.

    Attributes:
        weights: the positions of the inputs that are parameters and buffers.
        written: the positions of those among them that a run writes to.
        form: whether the graph is one that the form is for: eval, without gradients, and writes nothing.
        why: why the form can't be had for such a graph; empty if it can.
    """

    weights: list[int]
    written: list[int]
    form: bool
    why: str


def eligibility(graph: fx.GraphModule, found: Sequence[Site], inputs: Sequence[Any]) -> Eligibility:
    """Looks at a lowered graph, its sites and its inputs, within the compilation."""
    view = View(graph)
    weights = [index for index, node in enumerate(view.main.inputs) if freezing.is_static(node)]
    written = _written(view, found)
    live = any(site.training for site in found)
    form = bool(weights) and not (torch.is_grad_enabled() or written or live)
    return Eligibility(weights, written, form, _why(view, found, weights, inputs) if form else "")


def _written(view: View, found: Sequence[Site]) -> list[int]:
    """The inputs that are parameters or buffers and written to, by a site in train or by any op."""
    operands = [site.read(name) for site in found if site.training for name in site.op.stats]
    operands += [viewed(value) for node in view.nodes() for value in written_operands(node)]
    paths = {view.state[value] for value in operands if isinstance(value, fx.Node)} - {None}
    return [index for index, node in enumerate(view.main.inputs) if view.state[node] in paths]


def _why(view: View, found: Sequence[Site], weights: Sequence[int], inputs: Sequence[Any]) -> str:
    if any(not isinstance(value, torch.Tensor) for value in inputs):
        return "sizes of inputs vary"
    if any(any(isinstance(size, torch.SymInt) for size in value.shape) for value in inputs):
        return "sizes of inputs vary"
    if any(value.device.type != "cpu" or value.layout != torch.strided for value in inputs):
        return "not all inputs are dense tensors on the CPU"
    if any(inputs[index].dtype == torch.float64 for index in weights):
        return "Inductor can't pack weights in float64"
    idle = {site.node for site in found if site.training is False}  # that could draw random numbers, and don't
    nodes = [(body, node) for body in view.bodies for node in body.graph.nodes]
    return next((why for body, node in nodes if (why := _hinders(body, node, node in idle))), "")


def _hinders(body: Body, node: fx.Node, idle: bool) -> str:
    """What a node does that a graph on constants may not; empty if nothing."""
    if node.op == "call_module":
        return f"{node.target} is a module"
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        bases = [viewed(value) for value in written_operands(node)]
        outer = any(isinstance(base, fx.Node) and base.op in ("placeholder", "get_attr") for base in bases)
        if outer:
            return f"{node.target} writes to an input"
        return f"{node.target} draws random numbers" if _compat.draws_random_numbers(node.target) and not idle else ""
    if not isinstance(node.target, OpOverload | HigherOrderOperator) and node.target is not operator.getitem:
        return f"{node.target} is not an op of ATen"
    return f"{node.target} may have an effect" if not idle and has_effect(body.module, node) else ""
