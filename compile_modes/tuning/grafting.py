"""Nodes of one graph put into another one, and the fake values of all that depends on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from compile_modes import _compat, messages
from compile_modes.errors import summary
from compile_modes.graph.owners import join
from compile_modes.graph.view import View, attribute
from compile_modes.tuning.carrying import computed, fake_of


def graft(
    view: View, inputs: Sequence[fx.Node], output: fx.Node, donor: fx.GraphModule, module: nn.Module, owner: str
) -> None:
    """Puts the graph of a donor behind a node of the root's graph, and has all that uses that node use it instead.

    Args:
        view: the graphs; the root holds ``module`` at ``owner`` already.
        inputs: what the donor is called with.
        output: the node whose users get the donor's result.
        donor: the module of a program of ``module``, or the bound one.
        module: what the donor was made of.
        owner: where it is.

    Raises:
        TuningError: something that uses ``output`` can't take the donor's result.
    """
    graph, users = view.main.graph, list(output.users)
    known = dict(zip(donor.graph.find_nodes(op="placeholder"), inputs, strict=True))
    last = output
    for node in donor.graph.nodes:
        if node.op == "get_attr":
            known[node] = _read(view, donor, node, module, owner)
        elif node.op == "call_function":
            with graph.inserting_after(last):
                last = known[node] = graph.node_copy(node, known.__getitem__)
            _describe(last, output, owner)
            last.meta.pop("val", None)
            if (value := computed(last, view.main)) is not None:
                last.meta["val"] = value
    (result,) = pytree.tree_leaves(donor.graph.output_node().args[0])
    before = _compat.value(output)
    output.replace_all_uses_with(known[result], delete_user_cb=lambda user: user in users)
    if _layout(before) != _layout(_compat.value(known[result])):
        _propagate(view, known[result], owner)


def _read(view: View, donor: fx.GraphModule, node: fx.Node, module: nn.Module, owner: str) -> fx.Node:
    """The node for what a donor's graph reads: state or a flag of the module, or a constant of its program."""
    path = str(node.target)
    held = attribute(donor, path)
    if attribute(module, path) is not None:
        target = join(owner, path)
    else:
        count = 0
        while hasattr(view.root, target := f"_constant_{count}"):
            count += 1
        view.root.__dict__[target] = held
    first = next(iter(view.main.graph.nodes))
    with view.main.graph.inserting_before(first):
        read = view.main.graph.create_node("get_attr", target)
    if isinstance(held, torch.Tensor) and (value := fake_of(held, view.main)) is not None:
        read.meta["val"] = value
    return read


def _describe(node: fx.Node, like: fx.Node, owner: str) -> None:
    """Puts a node's module stack below that of the module that it comes into."""
    outer = {}
    for key, (path, kind) in (like.meta.get("nn_module_stack") or {}).items():
        if path == owner or path.startswith(f"{owner}."):
            break
        outer[key] = (path, kind)
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        below = join(owner, path) if path else owner
        outer[f"L__self__{below}"] = (below, kind)
    node.meta = {**node.meta, "nn_module_stack": outer}
    node.meta.pop("from_node", None)


def _propagate(view: View, start: fx.Node, owner: str) -> None:
    """Computes the fake values of what depends on a node anew.

    Raises:
        TuningError: a node doesn't take what it gets, or is a region, which isn't traced again.
    """
    stale = {start}
    for node in view.main.graph.nodes:
        if node.op == "output" or not stale.intersection(node.all_input_nodes):
            continue
        where = f"{node.name}, behind {owner!r}"
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op != "call_function":
            raise messages.HEAD_DOES_NOT_FIT.error(owner=owner, error="it goes into a region of the graph", where=where)
        before = _compat.value(node)
        try:
            value = computed(node, view.main)
        except Exception as error:  # whatever an operator raises for operands that don't fit
            raise messages.HEAD_DOES_NOT_FIT.error(owner=owner, error=summary(error), where=where) from error
        if value is not None:
            node.meta["val"] = value
            node.meta.pop("tensor_meta", None)
        if _layout(value) != _layout(before):
            stale.add(node)


def _layout(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_layout(item) for item in value]
    if isinstance(value, torch.Tensor):
        return [str(size) for size in value.shape], [str(step) for step in value.stride()], value.dtype
    return str(value)
