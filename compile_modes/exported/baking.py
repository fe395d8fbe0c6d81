"""``bake``: literals instead of the flags that a bound graph reads."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from torch import nn

from compile_modes import _compat, messages
from compile_modes.graph.calls import FOLDED
from compile_modes.graph.edits import set_argument
from compile_modes.graph.finding import find
from compile_modes.graph.flags import CELL, is_flag
from compile_modes.graph.folding import unfold
from compile_modes.graph.requests import check_overrides
from compile_modes.graph.rewrite import editable, write_literal
from compile_modes.graph.sites import KEPT, Site, add_note, note
from compile_modes.graph.view import Body, View

_M = TypeVar("_M", bound=nn.Module)


def bake(module: _M, training: bool | None = None) -> _M:
    """Writes the modes of a bound module back as literals, in place, for tools that want a plain graph.

    ``train()`` and ``eval()`` of the result raise, as those of ``ep.module()`` do, until it is bound again.

    Args:
        module: a bound module, or an OptimizedModule around one.
        training: the mode to write into all bound sites; None writes each owner's present one.

    Returns:
        ``module``.

    Raises:
        BindError: ``module`` has no graph, or a mode was given and no site is bound.
        OptionError: ``training`` is not a mode.
    """
    check_overrides(training, None)
    root = editable(module)
    view = View(root)
    found = find(view)
    bound = [site for site in found if site.bound]
    if found and not bound and training is not None:
        raise messages.NOTHING_BOUND.error(kind=type(root).__name__)
    write_back(view, {s: bool(s.training) if training is None else training is not s.inverted for s in bound})
    for site in found:
        if note(site.node).get("mode") == KEPT:
            add_note(site.node, mode=None)
    if bound:
        for name in ("train", "eval"):
            root.__dict__[name] = functools.partial(_baked, name)
    return module


def write_back(view: View, modes: Mapping[Site, bool]) -> None:
    """Writes modes into sites of a graph as literals, in place, and takes out what has read flags.

    Args:
        view: the graphs.
        modes: the mode of all bound sites, and of any other.
    """
    edited: set[nn.Module] = set()
    for site, mode in modes.items():
        if site.bound and site.op.flag is None:  # the literal probability, before write_literal decides what stays
            set_argument(site, str(site.op.p), site.p)
            site.bound = False
        edited |= write_literal(site, mode)
    for site in reversed(list(modes)):  # what is within another call first
        if site.node.target in FOLDED:
            unfold(site.node, site.body)
    for body in view.bodies:
        _drop_flags(body)
    for submodule in list(view.root.modules()):
        for name in [name for name in submodule._modules if name.startswith(CELL)]:
            delattr(submodule, name)
    for edited_module in edited:
        _compat.refresh(edited_module)


def _baked(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise messages.BAKED.error(method=method)


def _drop_flags(body: Body) -> None:
    for node in list(body.graph.nodes):
        if node.target is operator.mul and not node.users and is_flag(node.args[0]):
            body.graph.erase_node(node)
    for node in reversed(list(body.graph.nodes)):
        if is_flag(node) and not node.users:
            body.graph.erase_node(node)
