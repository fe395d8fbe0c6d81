"""Graphs as text to read: one line for each op, state by its path, and the owner of each op."""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from compile_modes import _compat
from compile_modes.bodies import Body, bodies, module_path, state_path
from compile_modes.flags import is_flag


def graph_text(root: nn.Module) -> str:
    """All graphs of a module: the root's first, and below it those of its regions and branches.

    Parameters, buffers, constants and flags stand under their paths, inputs and results under the names of their nodes.
    Types, device and memory formats are left out.
    """
    return "\n\n".join("\n".join(_lines(body)) for body in bodies(root))


def _lines(body: Body) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    inputs = body.graph.find_nodes(op="placeholder")
    for node in body.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "get_attr":
            names[node] = str(node.target) if is_flag(node) else state_path(body, node) or str(node.target)
        else:
            names[node] = node.name
    yield f"{body.path or 'forward'}({', '.join(names[node] for node in inputs)}):"
    for node in body.graph.nodes:
        if node.op == "output":
            yield f"    return {_shown(node.args[0], names)}"
        elif node.op not in ("placeholder", "get_attr") and node.target != _compat.GUARDS:
            operands = [_shown(value, names) for value in node.args]
            operands += [f"{name}={_shown(value, names)}" for name, value in node.kwargs.items()]
            owner = module_path(node)
            yield f"    {node.name} = {_target(node)}({', '.join(operands)})" + (f"  # {owner}" if owner else "")


def _shown(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_shown(item, names) for item in value) + ("," if len(value) == 1 else "") + ")"
    return str(value)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str | OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
