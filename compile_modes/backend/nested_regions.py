"""Graphs that several calls share (nested compile regions), made one per call: each call has modes of its own."""

import copy
from dataclasses import dataclass

from torch import fx, nn

from compile_modes import messages
from compile_modes._compat import kept
from compile_modes.graph.owners import dynamo_path, module_path
from compile_modes.graph.view import View, attribute


@dataclass(frozen=True)
class _Call:
    holder: fx.GraphModule
    node: fx.Node
    fetch: fx.Node


def separate(root: fx.GraphModule) -> None:
    """Gives each call a graph of its own, in place, with the names of the modules that this call is of.

    Dynamo traces a region once for all modules that it guards alike; the nodes inside know the first of them.

    Raises:
        CaptureError: which modules a call is of can't be told.
    """
    first: dict[nn.Module, _Call] = {}
    pending, copies = [root], 0
    while pending:
        holder = pending.pop(0)
        for node in list(holder.graph.nodes):
            if node.op != "call_function" or not kept.runs_bodies(node.target):
                continue
            for fetch in (n for n in node.all_input_nodes if n.op == "get_attr"):
                held = attribute(holder, str(fetch.target))
                if not isinstance(held, fx.GraphModule):
                    continue
                call = _Call(holder, node, fetch)
                if held in first:
                    copies += 1
                    held = _own(call, held, _renaming(root, first[held], call), copies)
                first.setdefault(held, call)
                pending.append(held)


def _own(call: _Call, shared: fx.GraphModule, renaming: tuple[str, str], number: int) -> fx.GraphModule:
    """A copy of a graph for one call, under a name of its own."""
    copied = fx.GraphModule(shared, copy.deepcopy(shared.graph))
    copied.meta = dict(shared.meta)
    for node in copied.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                f"own:{k}": (_renamed(path, renaming), kind) for k, (path, kind) in stack.items()
            }
    name = f"{call.fetch.target}_of_{number}"
    setattr(call.holder, name, copied)
    with call.holder.graph.inserting_before(call.node):
        fetch = call.holder.graph.create_node("get_attr", name)
        fetch.meta = dict(call.fetch.meta)
    # A region's second operand is the name by which AOTAutograd knows it from others.
    call.node.args = tuple(
        fetch if a is call.fetch else f"{a}_of_{number}" if isinstance(a, str) else a for a in call.node.args
    )
    if not call.fetch.users:
        call.holder.graph.erase_node(call.fetch)
    call.holder.recompile()
    return copied


def _renaming(root: fx.GraphModule, first: _Call, call: _Call) -> tuple[str, str]:
    """The path of the module that the first call is of, and of the one that another call is of."""
    before, after = module_path(first.node), module_path(call.node)
    if before != after:
        return before, after
    # A region that is no method: only its operands tell.
    if first.holder is not root or call.holder is not root:
        return "", ""
    state = View(root).state
    pairs = zip(first.node.args, call.node.args, strict=True)
    found = {_differing(state[a], state[b]) for a, b in pairs} - {("", "")}
    if len(found) > 1:
        modules = ", ".join(sorted(path for _, path in found))
        raise messages.SHARED_GRAPH.error(call=call.node.target, modules=modules)
    return next(iter(found), ("", ""))


def _differing(before: str | None, after: str | None) -> tuple[str, str]:
    """Two paths without what they end in together."""
    a, b = (before or "").split("."), (after or "").split(".")
    if before is None or after is None or a == b:
        return "", ""
    while a[-1:] == b[-1:]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


def _renamed(path: str, renaming: tuple[str, str]) -> str:
    before, after = renaming
    path = dynamo_path(path)
    return after + path.removeprefix(before) if before and f"{path}.".startswith(f"{before}.") else path
