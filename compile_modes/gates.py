"""Calls with a flag, around nodes that train mode runs and eval mode leaves out."""

from typing import Any

from torch import fx, nn


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


GATES = frozenset({noise, power_iteration})
