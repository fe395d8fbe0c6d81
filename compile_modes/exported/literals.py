"""Literals that a tool has replaced by its own defaults, put back from the program that it was given."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes.graph.edits import set_argument
from compile_modes.graph.finding import find, sites
from compile_modes.graph.owners import join
from compile_modes.graph.rewrite import editable
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View

_ADD = torch.ops.aten.add.Tensor
Home = tuple[str, str]


def restore_literals(module: nn.Module, exported: Any) -> list[str]:
    """Gives the sites of a module the literals that they had in the program that it was made from, in place.

    ``prepare_qat_pt2e`` puts a pattern with eps 1e-5 and momentum 0.1 in the place of each convolution with batch norm,
    whatever the model had; flips by torchao also lose the p of dropouts. Sites are matched by their statistics or their
    owner, and only literals change: eps, momentum and p. The eps that such a pattern adds to ``running_var`` itself is
    put right as well.

    Args:
        module: the prepared GraphModule, bound or not, or an OptimizedModule around it.
        exported: the program before, or anything else that :func:`compile_modes.sites` takes.

    Returns:
        What has changed, a line each, such as ``"bn: eps 1e-05 -> 0.001"``.

    Raises:
        BindError: ``module`` can't be edited, or has sites and none of them is in ``exported``.
    """
    root = editable(module)
    view = View(root)
    found, before = find(view), _literals(sites(exported))
    if found and not any(home_of(site) in before for site in found):
        homes = sorted({home or "(root)" for home, _ in map(home_of, found)})
        raise messages.OTHER_PROGRAM.error(owners=", ".join(homes))
    changed: list[str] = []
    edited: set[nn.Module] = set()
    stds = _variances(view)
    for site in found:
        for name, value in before.get(home_of(site), {}).items():
            old = site.literals.get(name)
            if old == value or not isinstance(old, float) or (name == site.op.p and site.op.flag is None):
                continue
            set_argument(site, name, value)
            edited.add(site.body.module)
            home = home_of(site)[0]
            changed.append(f"{home or '(root)'}: {name} {old} -> {value}")
            for owner, node in stds.pop((home, old), ()) if name in ("eps", "epsilon") else ():
                node.update_arg(1, value)
                edited.add(owner)
    for edited_module in edited:
        _compat.refresh(edited_module)
    return changed


def home_of(site: Site) -> Home:
    """Whose site it is, and its family, also where a tool has put a pattern that knows no owners in its place."""
    stats = site.body.view.state[site.read(site.op.stats[0])] if site.op.stats else None
    return (site.owner if stats is None else stats.rpartition(".")[0]), site.op.family


def _literals(found: Sequence[Site]) -> dict[Home, dict[str, Any]]:
    """The literals of each owner, as far as its sites agree on them."""
    values: dict[Home, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for site in found:
        for name, value in site.literals.items():
            values[home_of(site)][name].add(value)
    return {key: {n: next(iter(v)) for n, v in names.items() if len(v) == 1} for key, names in values.items()}


def _variances(view: View) -> dict[tuple[str, float], list[tuple[nn.Module, fx.Node]]]:
    """Where a graph itself adds a number to an owner's ``running_var``, by the owner and the number."""
    found: dict[tuple[str, float], list[tuple[nn.Module, fx.Node]]] = defaultdict(list)
    for body in view.bodies:
        for node in body.graph.nodes:
            if node.target is _ADD and isinstance(node.args[1], float):
                path = view.state[node.args[0]] or ""
                owner = path.rpartition(".")[0]
                if path == join(owner, "running_var"):
                    found[owner, node.args[1]].append((body.module, node))
    return found
