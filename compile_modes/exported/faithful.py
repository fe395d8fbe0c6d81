"""Exports that say what eager does where torch.export's own don't: reuse of a dropout's input, and grad modes."""

from contextlib import AbstractContextManager

from torch._ops import OpOverload
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes._compat import exporting
from compile_modes.graph.aliases import APART, returns_input
from compile_modes.graph.sites import add_note
from compile_modes.graph.view import Body, View


def faithful() -> AbstractContextManager[None]:
    """What is exported in it is to be :func:`settled`."""
    return exporting.exact(returns_input)


def settled(program: ExportedProgram) -> ExportedProgram:
    """A program that was exported so, edited in place: without what was added to it on the way.

    Dropouts whose input was kept apart from their result are noted: no use of the one stands for a use of the other.

    Raises:
        ExportError: torch.export has lost a region, so that an op would run in another grad mode than in eager.
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
        computes = isinstance(node.target, OpOverload) and bool(node.target._schema.returns)
        if marked and computes and grad_mode not in (None, marked[exporting.GRAD]):
            ours, eager = ("enabled", "disabled") if grad_mode else ("disabled", "enabled")
            raise messages.LOST_REGION.error(node=node.name, owner=body.view.owner[node], ours=ours, eager=eager)
        if marked.get(exporting.ALIAS):
            for user in node.users:
                if returns_input(user.target, user.args, dict(user.kwargs)):
                    add_note(user, **{APART: True})
            node.replace_all_uses_with(node.all_input_nodes[0])
            body.graph.erase_node(node)
    body.module.recompile()  # type: ignore[operator]
