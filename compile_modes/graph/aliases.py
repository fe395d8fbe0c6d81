"""Where the result of a dropout in eval may stand for its input: the two are one tensor there."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from compile_modes._compat import value
from compile_modes.graph.effects import named_arguments, written_operands
from compile_modes.graph.ops import lookup
from compile_modes.graph.sites import Site, note
from compile_modes.graph.sizes import MEASURES
from compile_modes.graph.view import Body

# Noted on dropouts: their input was kept apart from their result when they were exported, or it may have been reused.
APART, REUSED = "apart", "reused"

# What returns its operand itself if there is nothing to do, as seen by calling each op of ATen.
_MAY_RETURN_OPERAND = frozenset(
    {
        "aten::contiguous", "aten::to", "aten::type_as", "aten::flatten", "aten::real", "aten::conj",
        "aten::conj_physical", "aten::resolve_conj", "aten::resolve_neg", "aten::positive", "aten::atleast_1d",
        "aten::atleast_2d", "aten::atleast_3d", "aten::sum_to_size", "aten::to_dense", "aten::cpu",
    }
)  # fmt: skip
# What only looks at shape, dtype and device, in which result and input are alike.
_LOOKS = MEASURES | {torch.ops.aten._assert_tensor_metadata.default}


def returns_input(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is a dropout in eval that returns the very tensor which it is given, and would not in train.

    ``native_dropout``, which returns a mask as well, does so with the fake tensors of a tracer.
    """
    row = lookup(op)
    if row is None or row.family != "dropout" or row.flag is None or not isinstance(op, OpOverload):
        return False
    return not op._schema.is_mutable and row.read(args, kwargs, row.flag) is False


def shared(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the results of a node may share; all of them where the node doesn't tell."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if not isinstance(target, OpOverload):
        return list(node.all_input_nodes[:1] if target is operator.getitem else node.all_input_nodes)
    named, kwargs = named_arguments(node), dict(node.kwargs)
    if target._schema.name in _MAY_RETURN_OPERAND or returns_input(target, node.args, kwargs):
        return node.all_input_nodes
    if not any(result.alias_info is not None for result in target._schema.returns):
        return []
    given = [named.get(a.name) for a in target._schema.arguments if a.alias_info is not None]
    return [value for value in pytree.tree_leaves(given) if isinstance(value, fx.Node)]


def reused(site: Site) -> bool:
    """Whether users of a dropout exported in eval may have been users of its input: the two are one tensor there."""
    noted = note(site.node)
    if site.bound or APART in noted or REUSED in noted:
        return REUSED in noted
    node = site.node
    returned = list(_returned(node)) if returns_input(node.target, node.args, dict(node.kwargs)) else []
    return sum(_uses(site.body, value) for value in returned) > 1


def _returned(dropout: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a dropout's result."""
    if not dropout.target._schema.returns[1:]:  # type: ignore[union-attr]
        yield dropout
    else:
        yield from (user for user in dropout.users if user.target is operator.getitem and user.args[1] == 0)


def _uses(body: Body, node: fx.Node) -> int:
    """How often a value is used, under whatever node it stands: twice in one call and behind the calls that return it.

    Two if it is written to, for whether that was meant for the dropout's input or for its result can't be told.
    """
    count = 0
    for user in node.users:
        if user.target in _LOOKS:
            continue
        if user.op == "output" and body.parent is not None:
            count += sum(_uses(body.parent, result) for result in _results(body, node, user.args[0]))
            continue
        places = list(_passed_on(body, node, user))
        operands = pytree.tree_leaves((user.args, user.kwargs))
        count += sum(operand is node for operand in operands) - len(places)
        count += sum(_uses(*place) for place in places) + any(value is node for value in written_operands(user))
    return count


def _results(body: Body, node: fx.Node, returned: Any) -> Iterator[fx.Node]:
    """The nodes of the graph above that a value is returned to."""
    assert body.caller is not None
    if returned is node:  # by an UnflattenedModule's submodule, which returns no tuple
        yield body.caller
        return
    for user in body.caller.users:
        if user.target is operator.getitem and returned[user.args[1]] is node:
            yield user


def _passed_on(body: Body, node: fx.Node, user: fx.Node) -> Iterator[tuple[Body, fx.Node]]:
    """Where else the very value stands: an input of the graph that a call runs, or the result of what returns it."""
    child = body.children.get(user)
    for placeholder, operand in child.operands.items() if child is not None else ():
        if operand is node:
            yield child, placeholder  # type: ignore[misc]
    if isinstance(user.target, OpOverload) and user.args[:1] == (node,):
        same = user.target._schema.name in _MAY_RETURN_OPERAND and _metadata(user) == _metadata(node)
        if same:
            yield body, user
        elif returns_input(user.target, user.args, dict(user.kwargs)):
            yield from ((body, result) for result in _returned(user))


def _metadata(node: fx.Node) -> Any:
    known = value(node)
    return (known.shape, known.dtype, known.device) if isinstance(known, torch.Tensor) else None
