"""The mode of a node: a literal, or the value that it reads from a module's ``training``."""

import operator
from typing import Any

import torch
from torch import fx, nn

from compile_modes.graph.ops import ModeOp, lookup
from compile_modes.graph.owners import module_class
from compile_modes.graph.view import Body, attribute

CELL = "_mode_cell"  # name of a module that reads another one's flag, for graphs that can't reach that one
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


class Cell(nn.Module):
    """Reads the flag of another module, for a graph that can't reach that one by an attribute path.

    It holds no mode of its own, so that ``training`` may be set in any way. A body can't hold the module itself, whose
    state would be in the ``state_dict`` a second time.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.__dict__["_owner"] = (owner,)  # no submodule
        super().__init__()

    @property
    def owner(self) -> nn.Module:
        """The module whose mode it is."""
        owner: nn.Module = self.__dict__["_owner"][0]
        return owner

    @property
    def training(self) -> bool:
        """The owner's mode."""
        return self.owner.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Does nothing: ``train()`` of the body's root comes by here."""


def mode_of(body: Body, node: fx.Node, row: ModeOp) -> tuple[bool | None, fx.Node | None]:
    """The mode of a node, and the value that it reads it from, if that is a flag."""
    kwargs = dict(node.kwargs)
    if row.flag is not None:
        value = row.read(node.args, kwargs, row.flag)
        if is_flag(value):
            return _flag_value(body, value), value
        # native_dropout's None means train; a computed flag is shown as no mode of its own
        return (True if value is None else value if isinstance(value, bool) else None), None
    if row.p is not None:
        value = row.read(node.args, kwargs, row.p)
        if isinstance(value, fx.Node):
            scaled = value.target is operator.mul and is_flag(value.args[0])
            return (_flag_value(body, value.args[0]), value.args[0]) if scaled else (None, None)  # type: ignore[return-value]
        return value > 0, None
    return False if row.inference else row.implied, None


def _flag_value(body: Body, flag: Any) -> bool:
    if flag.target is operator.not_:
        return not _flag_value(body, flag.args[0])
    return bool(attribute(body.module, str(flag.target)))


def without_stats(node: fx.Node, row: ModeOp) -> bool:
    return bool(row.stats) and all(row.read(node.args, dict(node.kwargs), name) is None for name in row.stats)


def is_flag(value: Any) -> bool:
    """Whether a value of a graph is the ``training`` of a module, or its negation."""
    if not isinstance(value, fx.Node):
        return False
    if value.target is operator.not_:
        return is_flag(value.args[0])
    return value.op == "get_attr" and str(value.target).split(".")[-1] == "training"


def without_dropout(body: Body) -> list[fx.Node]:
    """The softmax of each MultiheadAttention that returns its weights and has, or had when exported, no dropout."""
    found: dict[str, fx.Node] = {}
    for node in body.graph.nodes:
        row = lookup(node.target)
        dropout = row is not None and row.family == "dropout"
        if not dropout and node.target not in _SOFTMAX:
            continue
        if (kind := module_class(node)) is not None and issubclass(kind, nn.MultiheadAttention):
            if dropout:
                found.pop(body.view.owner[node], None)
            else:
                found[body.view.owner[node]] = node
    return list(found.values())
