"""The graphs inside a module, and where the values in them come from.

An exported module is not one graph: ``no_grad`` and autocast regions are higher-order ops with a body each, and an
UnflattenedModule has a graph per submodule. A :class:`Body` is one of these graphs with the node that runs it.
"""

import copy
import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export.unflatten import InterpreterModule

from compile_modes import _compat
from compile_modes._compat import frames
from compile_modes.graph import calls

OWNED = "compile_modes_owned"  # in the meta of a body that belongs to one module alone


@dataclass(eq=False)
class Body:
    """One graph.

    Attributes:
        module: the module that owns the graph.
        path: attribute path of ``module`` from the root (``""`` for the root itself).
        parent: the body that runs this one, and ``caller`` the node there; both None for the root.
        always: whether the caller runs the body exactly once, so that a statement may be hoisted out of it.
        gated: whether it is, or is below, what a call of ``calls.py`` runs in train only.
        branch: whether it is, or is below, a branch of a switch.
        operands: what the caller passes for each placeholder, as far as known.
        children: the bodies that nodes of this graph run.
    """

    module: nn.Module
    path: str = ""
    parent: "Body | None" = None
    caller: fx.Node | None = None
    always: bool = True
    gated: bool = False
    branch: bool = False
    operands: dict[fx.Node, Any] = field(default_factory=dict)
    children: dict[fx.Node, "Body"] = field(default_factory=dict)

    @property
    def runs_once(self) -> bool:
        """Whether a run of the root runs this graph exactly once, or, of a branch, not at all."""
        chosen = self.caller is not None and self.caller.target is calls.switch
        return (self.always or chosen) and (self.parent is None or self.parent.runs_once)

    @property
    def graph(self) -> fx.Graph:
        return cast(fx.Graph, self.module.graph)


def own(root: nn.Module) -> bool:
    """Gives ``root`` bodies of its own, ahead of an edit; returns whether any was replaced.

    ``ep.module()`` and ``unflatten(ep)`` hand out the very body modules of the ExportedProgram, so an edit in place
    would reach the program and every other module made from it.
    """
    replaced: set[nn.Module] = set()
    for body in bodies(root):
        if body.parent is None or body.caller is None:
            continue
        module = body.module
        if body.parent.module in replaced:
            replaced.add(module)  # below a copy, which has seen to its own bodies
        elif body.caller.op == "call_function" and isinstance(module, fx.GraphModule) and OWNED not in module.meta:
            copied = fx.GraphModule(module, copy.deepcopy(body.graph))
            copied.meta = {**module.meta, OWNED: True}
            own(copied)
            holder, _, name = body.path.removeprefix(body.parent.path).lstrip(".").rpartition(".")
            setattr(attribute(body.parent.module, holder) if holder else body.parent.module, name, copied)
            replaced.add(module)
    return bool(replaced)


def canonical(path: str) -> str:
    """A module path without export's call indices: the second call of ``bn`` is recorded as ``bn@1``."""
    return re.sub(r"@\d+(?=\.|$)", "", path)


def hoist_constants(root: nn.Module) -> None:
    """Moves the constants of a program out of its submodules, where another program may have others of the name."""
    for node in root.graph.find_nodes(op="get_attr"):  # type: ignore[union-attr, operator]
        path, _, name = str(node.target).rpartition(".")
        holder = attribute(root, path) if path else root
        if path and isinstance(vars(holder).get(name), torch.Tensor):
            node.target = f"_constant_{len(vars(root))}"
            setattr(root, node.target, vars(holder)[name])
    _compat.refresh(root)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def bodies(root: nn.Module) -> list[Body]:
    """All graphs of ``root``, the root's first, each after the one that runs it."""
    found: list[Body] = []
    seen: set[nn.Module] = set()

    def visit(body: Body) -> None:
        if body.module in seen:  # a body that two nodes run is one graph, with one mode
            return
        seen.add(body.module)
        found.append(body)
        turns: dict[str, int] = {}
        for node in body.graph.nodes:
            for child in _children(body, node, turns):
                if node.target is not calls.switch:  # which has two
                    body.children[node] = child
                visit(child)

    visit(Body(root))
    return found


def called(body: Body, node: fx.Node) -> list[Body]:
    """The graphs that one node runs."""
    return list(_children(body, node, {}))


def _children(body: Body, node: fx.Node, turns: dict[str, int]) -> Iterator[Body]:
    if node.op == "call_module":
        target = str(node.target)
        module: Any = body.module.get_submodule(target)
        if hasattr(module, "call_modules"):  # unflatten's dispatcher: one graph per call, in turn
            turn = turns.get(target, 0)
            turns[target] = turn + 1
            module = module.call_modules()[turn]
        if isinstance(getattr(module, "graph", None), fx.Graph):
            child = Body(module, join(body.path, target), body, node)
            inputs = child.graph.find_nodes(op="placeholder")
            child.operands = dict(zip(inputs, node.args, strict=False))
            child.operands |= {p: node.kwargs[p.target] for p in inputs if p.target in node.kwargs}
            yield child
    elif node.op == "call_function":
        always, gate = node.target in _compat.UNCONDITIONAL_HOPS, node.target in calls.GATES
        for position, arg in enumerate(node.args):
            if isinstance(arg, fx.Node) and arg.op == "get_attr":
                module = attribute(body.module, str(arg.target))
                if isinstance(module, fx.GraphModule):
                    switch = node.target is calls.switch
                    child = Body(module, join(body.path, str(arg.target)), body, node, always, gate or body.gated)
                    child.branch = switch or body.branch
                    inputs = child.graph.find_nodes(op="placeholder")
                    operands = [a for a in node.args[position + 1 :] if not isinstance(a, str)]  # a region's name
                    operands = list(node.args[3:]) if switch else operands
                    if (gate or switch or node.target in _compat.PASSING_HOPS) and len(inputs) == len(operands):
                        child.operands = dict(zip(inputs, operands, strict=True))
                    yield child


def attribute(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None if there is none."""
    for name in path.split("."):
        if not hasattr(module, name):
            return None
        module = getattr(module, name)
    return module


def origin(body: Body | None, value: Any) -> fx.Node | None:
    """The node of the root's graph that an operand in a body stands for, if the way up is known."""
    while body is not None and body.parent is not None:
        body, value = body.parent, body.operands.get(value)
    return value if isinstance(value, fx.Node) else None


def state_path(body: Body | None, value: Any) -> str | None:
    """The attribute path of the parameter or buffer that a value of a graph is, or None if it is none."""
    while body is not None and isinstance(value, fx.Node):
        node: fx.Node = value
        if node.op == "get_attr":
            return canonical(join(body.path, str(node.target)))
        if node.op == "placeholder":
            operand = body.operands.get(node)
            if operand is None:
                return dynamo_path(frames.source_name(node)) or None
            body, value = body.parent, operand
        elif calls.is_counter(node):  # returns the tensor that it advances
            value = node.args[0]
        else:
            body, value = _returned(body, node)
    return None


def _returned(body: Body, node: fx.Node) -> tuple[Body | None, Any]:
    """The value inside a child body that a call, or an item of its result, returns."""
    index = None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        index, node = node.args[1], node.args[0]
    child = body.children.get(node)
    if child is None:
        return None, None
    result: Any = child.graph.output_node().args[0]
    if index is not None:
        result = result[index]
    return child, result


def dynamo_path(source: str) -> str:
    """A path as ``named_modules()`` writes it, from the way Dynamo writes it.

    >>> dynamo_path("L['self']._modules['b']._modules['0']._buffers['running_mean']")
    'b.0.running_mean'
    >>> dynamo_path("L['self'].seq.1")
    'seq.1'
    """
    path = re.sub(r"^[LG]\[[^\]]*\]", "", source)
    path = re.sub(r"\._(?:modules|buffers|parameters)\['([^']*)'\]", r".\1", path)
    return path.lstrip(".")


def module_path(node: fx.Node) -> str:
    """The path of the submodule whose ``forward`` ran ``node``, from its ``nn_module_stack``; ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    return canonical(dynamo_path(list(stack.values())[-1][0])) if stack else ""


def module_classes(node: fx.Node) -> list[type[nn.Module] | None]:
    """The classes of the modules around a node, the innermost last; None where it is not known in this process."""
    found: list[type[nn.Module] | None] = []
    for _, kind in (node.meta.get("nn_module_stack") or {}).values():
        if isinstance(kind, str):  # export writes the qualified name
            module, _, name = kind.rpartition(".")
            kind = getattr(sys.modules.get(module), name, None)
        found.append(kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None)
    return found


def module_class(node: fx.Node) -> type[nn.Module] | None:
    """The class of that submodule; None if it is not known."""
    return next(reversed(module_classes(node)), None)


def is_batch_norm(node: fx.Node) -> bool | None:
    """Whether that submodule is one of torch's batch norms, or derived from one; None if its class is not known.

    Captured from an unflattened module, a node has that module's classes, which don't say what they were before export.
    """
    kind = module_class(node)
    return None if kind is None or issubclass(kind, InterpreterModule) else issubclass(kind, _compat.BATCH_NORM)


def from_dynamo(body: Body) -> bool:
    """Whether the graph that runs ``body`` was captured under Dynamo, which says where its inputs come from."""
    while body.parent is not None:
        body = body.parent
    return any(frames.source_name(node) for node in body.graph.find_nodes(op="placeholder"))
