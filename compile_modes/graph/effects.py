"""What a node does beside returning its value: what decides whether one that nobody reads may go.

``fx.Node.is_impure()`` looks at a call alone. Of a region (``wrap_with_set_grad_enabled`` and its kin) it says that the
call does nothing, although its body may write a buffer. A call does here what its bodies do, at any depth.
"""

import operator
from typing import Any, cast

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from compile_modes import _compat
from compile_modes.graph import calls
from compile_modes.graph.ops import lookup
from compile_modes.graph.view import attribute


def has_effect(module: Any, node: fx.Node) -> bool:
    """Whether a node may write to what it is given, move a random generator, or anything else that outlasts it.

    Args:
        module: the module that holds the node's graph, and with it the graphs that the node runs.
        node: a node of that graph. One that calls what can't be looked into counts as having an effect.
    """
    if node.op == "call_module":
        called = attribute(module, str(node.target))
        graph = getattr(called, "graph", None)
        return not isinstance(graph, fx.Graph) or any(has_effect(called, inner) for inner in graph.nodes)
    if node.op != "call_function":
        return False
    row = lookup(node.target) if node.target is not calls.switch else None  # either branch may write
    if row is not None and (row.flag is not None or row.implied is not None):
        mode = row.implied if row.flag is None else row.read(node.args, dict(node.kwargs), row.flag)
        if mode is False and not _mutable(node.target):
            return False
        if row.stats or row.family in ("dropout", "rrelu", "rnn"):
            return True  # the schema of batch norm doesn't say that it writes its statistics
    held = [attribute(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    graphs = [value for value in held if isinstance(value, fx.GraphModule)]
    if any(has_effect(graph, inner) for graph in graphs for inner in graph.graph.nodes):
        return True
    if isinstance(node.target, HigherOrderOperator) and not graphs:
        return True
    return _mutable(node.target) or _compat.draws_random_numbers(node.target) or node.is_impure()


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """What a call of an overload is given, by the names of its schema."""
    names = (argument.name for argument in cast(OpOverload, node.target)._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def written_operands(node: fx.Node) -> list[Any]:
    """The operands that a node writes to by its schema; that of batch norm does not say so."""
    if not _mutable(node.target):
        return []
    given = named_arguments(node)
    arguments = cast(OpOverload, node.target)._schema.arguments
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for item in written for value in (item if isinstance(item, list | tuple) else (item,))]


def viewed(value: Any) -> Any:
    """What a value is a view of: ``buffer[:2] = x`` writes to the buffer."""
    while isinstance(value, fx.Node) and value.op == "call_function" and _hands_on(value.target):
        value = value.args[0]
    return value


def _hands_on(target: Any) -> bool:
    return target is operator.getitem or is_view(target)


def is_view(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns)


def _mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)
