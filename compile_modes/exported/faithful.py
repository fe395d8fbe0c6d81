"""Exports that say what eager does where torch.export's own don't: reuse of a dropout's input, and grad modes."""

import operator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes._compat import exporting
from compile_modes.errors import ModeWarning, few
from compile_modes.graph.aliases import APART, returns_input
from compile_modes.graph.sites import add_note
from compile_modes.graph.view import Body, View

_COPY_ = torch.ops.aten.copy_.default


def faithful() -> AbstractContextManager[None]:
    """What is exported in it is to be :func:`settled`."""
    return exporting.exact(returns_input)


def settled(program: ExportedProgram) -> ExportedProgram:
    """A program that was exported so, edited in place: without what was added to it on the way.

    Dropouts whose input was kept apart from their result are noted: no use of the one stands for a use of the other.

    Raises:
        ExportError: torch.export has lost a region, so that an op would run in another grad mode than in eager, or the
            backward of an ``autograd.Function``.
    """
    modes: dict[Body | None, bool | None] = {None: True}
    for body in View(program.graph_module).bodies:
        before, call = modes[body.parent], body.caller
        if call is None or before is None or call.target in _compat.UNCONDITIONAL_HOPS:
            modes[body] = before if call is None or before is None else _compat.grad_mode(call, before)
        else:
            modes[body] = None  # of a branch or a loop, which has its own ways with autograd
        _settle(body, modes[body])
    return program


def _settle(body: Body, grad_mode: bool | None) -> None:
    for node in list(body.graph.nodes):
        marked = exporting.mark(node)
        exporting.unmark(node)
        # What takes results of a region apart, and checks them, has the marks of what made them.
        # So has the write into a buffer of the root that torch.export adds for an assignment.
        added = node.target is _COPY_ and node.all_input_nodes[0].op == "placeholder"
        computes = isinstance(node.target, OpOverload) and bool(node.target._schema.returns) and not added
        if marked and computes and grad_mode not in (None, marked[exporting.GRAD]):
            if marked[exporting.FUNCTION]:
                raise messages.LOST_BACKWARD.error(
                    function=marked[exporting.FUNCTION], node=node.name, owner=body.view.owner[node]
                )
            ours, eager = ("enabled", "disabled") if grad_mode else ("disabled", "enabled")
            raise messages.LOST_REGION.error(node=node.name, owner=body.view.owner[node], ours=ours, eager=eager)
        if marked.get(exporting.ALIAS):
            for user in node.users:
                if returns_input(user.target, user.args, dict(user.kwargs)):
                    add_note(user, **{APART: True})
            node.replace_all_uses_with(node.all_input_nodes[0])
            body.graph.erase_node(node)
    body.module.recompile()  # type: ignore[operator]


def lost_grad_mode(view: View) -> ModeWarning | None:
    """What to warn of where a stock export may have dropped a ``no_grad()`` inside an autocast region.

    All that such a program shows is that torch.export has split the region where grad mode was switched: regions of one
    module with the same settings, and nothing between them. A switch to enabled gradients leaves the same, and so do
    regions that stand one behind the other in the model. Of a lost ``inference_mode()`` nothing shows.
    """
    owners: list[str] = []
    for body in view.bodies:
        before: fx.Node | None = None
        for node in body.graph.nodes:
            if node.target is _compat.AUTOCAST:
                if before is not None and _settings(view, before) == _settings(view, node):
                    owners.append(repr(view.owner[node]))
                before = node
            elif node.op != "get_attr" and node.target is not operator.getitem:
                before = None
    if not owners or not any(parameter.requires_grad for parameter in view.root.parameters()):
        return None
    return messages.MAY_HAVE_LOST_NO_GRAD.warning(owners=few(dict.fromkeys(owners)))


def _settings(view: View, region: fx.Node) -> Any:
    """What an autocast region was entered with, and in which module."""
    return region.args[:4], view.owner[region]
