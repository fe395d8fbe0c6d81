"""Memory that a dropout's result shares with its input in eval mode, where eager returns the input itself."""

from collections.abc import Container
from typing import Any

from torch import fx

from compile_modes.graph.effects import is_view, viewed, written_operands


def shares_writes(node: fx.Node, dropouts: Container[Any]) -> bool:
    """Whether it can be told, in eval mode, if a dropout has returned its input or a copy.

    It can if both are alive, and something writes to one of them in place; or if an input of the graph is returned.

    Args:
        node: a call of a dropout that does not write to its input.
        dropouts: the ops that return their input in eval mode, or write to it and return it.
    """
    if _is_last_use(node, dropouts):
        return False
    base = _base(node, dropouts)
    written = (value for other in node.graph.nodes for value in written_operands(other))
    if any(_base(value, dropouts) is base for value in written):
        return True
    returned = node.graph.output_node().all_input_nodes
    return base.op in ("placeholder", "get_attr") and any(_base(value, dropouts) is base for value in returned)


def _is_last_use(node: fx.Node, dropouts: Container[Any]) -> bool:
    """Whether the memory of a node's input is of no use to anything else."""
    value = node.args[0]
    while isinstance(value, fx.Node) and value.op == "call_function" and len(value.users) == 1:
        if not _returns_operand(value, dropouts):
            return True
        value = value.args[0]
    return False


def _base(value: Any, dropouts: Container[Any]) -> Any:
    """What a value may be the same memory as, in eval mode."""
    while isinstance(value, fx.Node) and _returns_operand(value, dropouts):
        value = value.args[0]
    return value


def _returns_operand(value: fx.Node, dropouts: Container[Any]) -> bool:
    if value.op != "call_function" or not value.args:
        return False
    view = viewed(value) is not value or is_view(value.target)
    return view or value.target in dropouts or value.args[0] in written_operands(value)
