"""Calls that carry a mode and are no ATen ops: in the parts of a captured graph that are kept as they came."""

import functools
import inspect
import types
from dataclasses import replace
from typing import Any

from torch import fx

from compile_modes import messages
from compile_modes._compat import aten_overload
from compile_modes.graph.ops import TABLE, ModeOp

# In the meta of a call of a function that the graph does not show: the modes of what it calls, None if not known.
HIDDEN = "compile_modes_hidden"

KEPT = messages.KEPT_CALL.reason()
_HIDDEN = messages.HIDDEN_CALL.reason()
_FLAGS = ("training", "use_input_stats")
_FAMILIES = ("dropout", "batch_norm", "instance_norm", "rrelu", "attention")


def kept_call(node: fx.Node) -> ModeOp | None:
    """The row of a call of ``torch.nn.functional`` or of a function of the user's; None if it has no mode."""
    if HIDDEN in node.meta:
        modes: frozenset[bool | None] = node.meta[HIDDEN]
        implied = next(iter(modes)) if len(modes) == 1 else None
        return ModeOp(_named(node.target), "function", implied=implied, refusal=_HIDDEN) if modes else None
    if isinstance(node.target, types.BuiltinFunctionType):
        return _row_behind(node.target.__name__)
    if getattr(node.target, "__module__", None) == "torch.nn.functional":
        return _row(node.target) if isinstance(node.target, types.FunctionType) else None
    return None


def is_kept(row: ModeOp) -> bool:
    """Whether a row is one of :func:`kept_call`."""
    return row.refusal in (KEPT, _HIDDEN)


@functools.cache
def _row(target: types.FunctionType) -> ModeOp | None:
    name, parameters = target.__name__, inspect.signature(target).parameters
    flag = next((flag for flag in _FLAGS if flag in parameters), None)
    family = next((family for family in _FAMILIES if family in name), name)
    stats = tuple(stat for stat in ("running_mean", "running_var") if stat in parameters)
    return ModeOp(target, family, flag=flag, stats=stats, refusal=KEPT) if flag else None


@functools.cache
def _row_behind(name: str) -> ModeOp | None:
    """The row of the ATen op behind a builtin; which of several overloads is called, and how, is not known."""
    row = TABLE.get(aten_overload(name))
    if row is not None:
        return replace(row, counter=False, refusal=KEPT)
    row = TABLE.get(aten_overload(name + ".input"))
    return replace(row, flag=None, p=None, refusal=KEPT) if row is not None else None


def _named(target: Any) -> Any:
    """Something with the name of a call's target and a signature, which builtins and higher-order ops may not have."""

    def function(*operands: Any) -> None: ...

    function.__name__ = str(getattr(target, "__name__", target))
    return function
