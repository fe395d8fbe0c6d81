"""Drop-ins for ``torch.ao.quantization`` / torchao: same names and contracts, without pattern replacement."""

from typing import Any, TypeVar

from torch import fx, nn

from compile_modes import messages
from compile_modes.errors import few_lines
from compile_modes.exported.binding import bind
from compile_modes.exported.planning import plan_binding
from compile_modes.exported.recompose import recompose
from compile_modes.graph.dual import DualModule
from compile_modes.graph.edits import own
from compile_modes.graph.finding import find
from compile_modes.graph.rewrite import Report, apply, editable
from compile_modes.graph.sites import HARD_CODED, Site, add_note
from compile_modes.graph.view import View

_M = TypeVar("_M", bound=nn.Module)


def model_is_exported(m: Any) -> bool:
    """Whether ``m`` is a GraphModule that came from ``torch.export``, and not one that was only traced by FX."""
    return isinstance(m, fx.GraphModule) and any("val" in node.meta for node in m.graph.nodes)


def move_exported_model_to_eval(model: _M) -> _M:
    """Puts an exported model into eval mode, as ``model.eval()`` does for an eager one; returns it.

    In a model that isn't bound the mode is left as a literal in the arguments of the nodes, as torchao leaves it;
    ``train()`` and ``eval()`` keep raising. In a bound one it sets the flags. Calling it again changes nothing.

    Args:
        model: what :func:`compile_modes.bind` takes, but for an ExportedProgram.

    Raises:
        BindError: there is no graph, or it is a program's.

    Warns:
        ModeWarning: some sites can't be put into the mode, with the reason for each.
    """
    return _move(model, False)


def move_exported_model_to_train(model: _M) -> _M:
    """Puts an exported model into train mode, as ``model.train()`` does for an eager one; returns it.

    As :func:`move_exported_model_to_eval`.
    """
    return _move(model, True)


def allow_exported_model_train_eval(model: _M) -> _M:
    """Makes ``train()`` and ``eval()`` work on an exported model, and on its submodules; returns it.

    Unlike torchao's it leaves the mode as it is, keeps every literal, and the methods return the model.
    """
    bound: _M = bind(model)
    return bound


def _move(model: _M, training: bool) -> _M:
    if isinstance(getattr(model, "_orig_mod", model), DualModule):
        return model.train(training)
    root = editable(model)
    view = View(root)
    found = find(view)
    if any(site.bound for site in found) or (not found and "train" not in vars(root)):
        return model.train(training)
    if all(_is(site, training) for site in found):
        return model
    view = recompose(view).view
    if own(view):
        view = View(root)
    plan = plan_binding(view, ())
    for site in plan.odd:  # what is at odds with its module now is at odds with it after the flip
        add_note(site.node, mode=HARD_CODED)
    inverted = {site.node for site in plan.inverted}
    wanted = [*plan.bindable, *(site for site, _ in plan.stuck)]
    report = apply([(site, training is not (site.node in inverted)) for site in wanted])
    _complain(report, training)
    return model


def _is(site: Site, training: bool) -> bool:
    """Whether a flip leaves a site of an unbound module alone."""
    return site.modeless or site.hard_coded or site.training is training


def _complain(report: Report, training: bool) -> None:
    if not report.refused:
        return
    lines = [f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in report.refused]
    mode = "train" if training else "eval"
    messages.NOT_MOVED.warn(count=len(lines), sites=few_lines(lines), mode=mode)
