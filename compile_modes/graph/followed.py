"""What autograd follows: in a graph that is not differentiated yet, and from results that were computed."""

from collections.abc import Sequence

import torch
from torch import fx

from compile_modes import _compat
from compile_modes.graph.view import Body


def followed_by_autograd(graphs: Sequence[Body]) -> set[fx.Node]:
    """The nodes whose results autograd may follow; too many of them rather than too few.

    Args:
        graphs: those of a view, each after the one that runs it.
    """
    grad_at: dict[fx.Node, bool] = {}  # for a call that runs a body: the grad mode inside
    followed: set[fx.Node] = set()
    for body in graphs:
        grad = torch.is_grad_enabled() if body.caller is None else grad_at[body.caller]
        for node in body.graph.nodes:
            grad_at[node] = _compat.grad_mode(node, grad)
            if node not in body.children:
                grad = grad_at[node]
            if _follows(body, node, grad_at[node], followed):
                followed.add(node)
    return followed


def _follows(body: Body, node: fx.Node, grad: bool, followed: set[fx.Node]) -> bool:
    if node.op == "placeholder" and body.caller is not None:
        operand = body.operands.get(node)
        return operand is None or operand in followed  # the operands of a branch are not known
    if node.op in ("placeholder", "get_attr"):
        return _compat.may_require_grad(node)
    return grad and any(operand in followed for operand in node.all_input_nodes)


def leaves(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that autograd would accumulate gradients into: parameters, inputs, and tensors from anywhere else."""
    found: dict[int, torch.Tensor] = {id(t): t for t in results if t.grad_fn is None}
    seen, waiting = set(), [t.grad_fn for t in results]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), torch.Tensor):
            found[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())
