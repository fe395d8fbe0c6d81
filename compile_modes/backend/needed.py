"""Whether a form may have work in a graph that Dynamo has made: if not, it need not be captured.

Dynamo's graph calls torch's functions, whose ops only a capture shows. What decides here may see too much, and must not
see too little: a graph that isn't captured goes to Inductor as it came.
"""

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from compile_modes.graph.effects import is_view, written_operands
from compile_modes.graph.ops import TABLE

_IN_PLACE = frozenset(
    {
        operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
        operator.ilshift, operator.irshift,
    }
)  # fmt: skip
# Methods and attributes whose result may share memory with the tensor that they are of.
_VIEWS = frozenset(
    {
        "data", "detach", "alias", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
        "getitem", "__getitem__", "select", "narrow", "transpose", "t", "T", "mT", "H", "mH", "permute",
        "movedim", "swapaxes", "swapdims", "squeeze", "unsqueeze", "expand", "expand_as", "diagonal", "unbind",
        "chunk", "split", "tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes", "unfold",
        "as_strided", "real", "imag", "view_as_real", "view_as_complex", "contiguous", "to", "type", "float",
        "double", "half", "bfloat16", "cpu", "cuda", "ravel", "adjoint", "requires_grad_", "getattr",
    }
)  # fmt: skip


def _names(rows: Iterator[Any]) -> frozenset[str]:
    """What torch's functions are called that lead to these ops."""
    return frozenset(r.overload._schema.name.partition("::")[2] for r in rows if isinstance(r.overload, OpOverload))


_RECURRENT = _names(row for row in TABLE.values() if row.family == "rnn")
_WITH_STATISTICS = _names(row for row in TABLE.values() if row.stats)


def may_lower(gm: fx.GraphModule) -> bool:
    """Whether a graph may hold what :func:`compile_modes.forms.lower.lower` does something about without being asked.

    That are recurrent ops, and state that is written and has a use beside that: another read of it, say.

    Args:
        gm: Dynamo's graph, with the graphs that its calls run as submodules.
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_module" or _name(node.target) in _RECURRENT:
                    return True
                if any(module is not gm or len(held.users) > 1 for held in _written(node)):
                    return True
    return False


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs and attributes of a graph that a node may write to."""
    given: list[Any] = []
    name, target = _name(node.target), node.target
    if name in _WITH_STATISTICS:
        given = [n for n in node.all_input_nodes if n.op in ("placeholder", "get_attr")]
    elif node.op == "call_method":
        given = [node.args[0]] if name.endswith("_") and not name.endswith("__") else []
    elif isinstance(target, OpOverload):
        given = written_operands(node)
    elif node.op == "call_function" and not isinstance(target, HigherOrderOperator):  # whose bodies are looked at
        if target in _IN_PLACE or node.kwargs.get("inplace") is True or name.endswith("_") or True in node.args:
            given = [node.args[0]]
        given.append(node.kwargs.get("out"))
    for value in given:
        value = _origin(value)
        if isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr"):
            yield value


def _origin(value: Any) -> Any:
    """What a value may be a view of."""
    while isinstance(value, fx.Node) and value.op in ("call_method", "call_function") and value.args:
        if not (is_view(value.target) if isinstance(value.target, OpOverload) else _name(value.target) in _VIEWS):
            return value
        value = value.args[0]
    return value


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target._schema.name.partition("::")[2])
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))
