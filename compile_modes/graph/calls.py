"""What a graph of ours may call beside ATen: a step of a counter, and regions that run in train only.

Batch norm's ``num_batches_tracked`` is a statement that eager runs beside the op, and a node of the graph here. A
random mask or a power iteration is several nodes that train mode runs and eval mode leaves out: one call with a flag.
"""

from typing import Any

import torch
from torch import fx, nn

ADD_ = torch.ops.aten.add_.Tensor


@fx.has_side_effect
def advance(counter: torch.Tensor, training: bool) -> torch.Tensor:
    """Adds 1 to ``counter`` (int64, 0-d) in place if ``training``; returns it.

    A bound graph calls this where an exported train graph has ``add_(counter, 1)``. ``add_(counter, training)``
    would do without a function of ours, but in eval it still writes the buffer: Inductor emits a kernel for it,
    the version counter moves, and an inference tensor refuses it.
    """
    return counter.add_(1) if training else counter


def is_counter(node: fx.Node) -> bool:
    """Whether ``node`` has the form of a counter's step; whose counter it is, its first operand tells."""
    if node.op != "call_function":
        return False
    return node.target is advance or (node.target is ADD_ and node.args[1:] == (1,) and not node.kwargs)


def bind_counter(step: fx.Node, flag: fx.Node) -> None:
    """Makes a step of an exported train graph depend on ``flag``."""
    step.target, step.args = advance, (step.args[0], flag)


def set_counter(step: fx.Node, training: bool) -> None:
    """Makes a step unconditional, or removes it."""
    if training:
        step.target, step.args = ADD_, (step.args[0], 1)
    else:
        step.replace_all_uses_with(step.all_input_nodes[0])
        step.graph.erase_node(step)


def insert_counter(graph: fx.Graph, anchor: fx.Node, counter: fx.Node, flag: fx.Node | bool) -> fx.Node:
    """Puts a step before ``anchor``, bound to ``flag`` or, if that is True, unconditional."""
    target, operand = (advance, flag) if isinstance(flag, fx.Node) else (ADD_, 1)
    with graph.inserting_before(anchor):
        step = graph.create_node("call_function", target, (counter, operand), name="add_")
    if (stack := anchor.meta.get("nn_module_stack")) is not None:
        step.meta["nn_module_stack"] = stack
    if "val" in counter.meta:  # which programs of torch.export must have
        step.meta["val"] = counter.meta["val"]
    return step


@fx.has_side_effect  # draws random numbers, and may be applied in place
def noise(training: bool, results: int, region: nn.Module, *operands: Any) -> Any:
    """A random mask and its application (DropPath): ``region(*operands)`` in train, nothing in eval.

    Args:
        training: the mode.
        results: how many values ``region`` returns; in eval, as many of the first operands are returned instead.
        region: the nodes.
        operands: what the nodes take from outside.
    """
    return region(*operands) if training else operands[:results]


@fx.has_side_effect
def power_iteration(training: bool, results: int, region: nn.Module, *operands: Any) -> Any:
    """Spectral norm's update in place of its two vectors, which come first among the operands; see :func:`noise`."""
    return region(*operands) if training else operands[:results]


@fx.has_side_effect
def switch(training: bool, train: nn.Module, evaluation: nn.Module, *operands: Any) -> Any:
    """What Python decides: one of two branches.

    Args:
        training: the mode of the module that decides.
        train, evaluation: the branches. Each returns as many values; what only the other one computes is None.
        operands: what either takes from outside.
    """
    return train(*operands) if training else evaluation(*operands)


GATES = frozenset({noise, power_iteration})
# All calls that a mode makes into some of their nodes, or into none.
FOLDED = GATES | {switch}
