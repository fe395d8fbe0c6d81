"""The graph-to-graph rewrite: put sites into a mode, change nothing else."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, messages, pages
from compile_modes.graph import calls
from compile_modes.graph.edits import insert_dropout, insert_step, loosen_views, own, set_argument
from compile_modes.graph.finding import find, graph_root
from compile_modes.graph.folding import fold
from compile_modes.graph.requests import MODES, check_overrides, no_match, owner_matches
from compile_modes.graph.sites import Site, add_note
from compile_modes.graph.view import View, attribute


@dataclass(frozen=True)
class Report:
    """What :func:`set_mode` did.

    Attributes:
        changed: sites that were put into another mode.
        unchanged: sites that were in the wanted mode before, or do the same in both.
        refused: sites that cannot be put into the wanted mode, each with the reason.
    """

    changed: tuple[Site, ...]
    unchanged: tuple[Site, ...]
    refused: tuple[tuple[Site, str], ...]

    def __str__(self) -> str:
        counts = f"{len(self.changed)} changed, {len(self.unchanged)} already right, {len(self.refused)} refused"
        return "\n".join([counts, *(f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in self.refused)])

    def _repr_html_(self) -> str:
        return pages.report(str(self))


def set_mode(graph_module: nn.Module, training: bool | None, *, overrides: Mapping[str, str] | None = None) -> Report:
    """Puts the mode-dependent sites of a pre-autograd ATen graph into a mode, in place.

    Only the argument that carries the mode changes, and the step of batch norm's ``num_batches_tracked`` comes and
    goes with it. A bound site stays bound: its owner's ``training`` is set instead. Idempotent, linear in nodes.

    Args:
        graph_module: an exported, captured, PT2E-prepared or bound graph.
        training: the mode for all sites that no override names; None leaves them as they are.
        overrides: ``{owner glob: "train" | "eval"}``; the first pattern that matches a site's owner decides.

    Raises:
        OptionError: ``training`` or an override's mode is not one.
        OverrideError: a pattern matches no site. Nothing has been changed then.
        BindError: ``graph_module`` holds no graph, or is an ExportedProgram.
    """
    overrides = check_overrides(training, overrides)
    root = editable(graph_module)
    view = View(root)
    wanted = assign(find(view), training, overrides)
    if own(view):
        wanted = assign(find(View(root)), training, overrides)
    return apply(wanted)


def editable(module: Any) -> nn.Module:
    """:func:`graph_root` of something whose graph may be edited in place; a program hands out copies only."""
    if isinstance(module, torch.export.ExportedProgram):
        raise messages.NOT_EDITABLE.error()
    return graph_root(module)


def assign(found: Iterable[Site], training: bool | None, overrides: Mapping[str, str]) -> list[tuple[Site, bool]]:
    """The mode that each site is asked to be in; sites that nothing asks for are left out."""
    found = list(found)
    wanted = []
    for site in found:
        named = next(
            (MODES[mode] for pattern, mode in overrides.items() if owner_matches(site.owner, pattern)), training
        )
        if named is not None:
            wanted.append((site, named))
    owners = sorted({site.owner for site in found})
    for pattern in overrides:
        if not any(owner_matches(owner, pattern) for owner in owners):
            raise no_match(pattern, owners, "overrides")
    return wanted


def apply(wanted: Iterable[tuple[Site, bool]], refusal: Callable[[Site, bool], str] = Site.refusal) -> Report:
    """Carries out :func:`assign`; ``refusal`` decides what cannot be."""
    changed, unchanged, refused = [], [], []
    for site, training in wanted:
        if site.modeless or site.training is training:
            unchanged.append(site)
        elif why := refusal(site, training):
            refused.append((site, why))
        else:
            changed.append((site, training))
    edited: set[nn.Module] = set()
    for site, training in changed:
        if site.bound:
            set_flag(site, training)
        else:
            edited |= write_literal(site, training)
        site.training = training
    for module in edited:
        _compat.refresh(module)
    return Report(tuple(site for site, _ in changed), tuple(unchanged), tuple(refused))


def set_flag(site: Site, training: bool) -> None:
    """Sets the flag that a bound site reads, so that the site is in the given mode."""
    value = site.read(site.op.flag or str(site.op.p))
    flag = value if site.op.flag else value.args[0]
    if site.inverted:
        flag, training = flag.args[0], not training
    holder = str(flag.target).rpartition(".")[0]
    (attribute(site.body.module, holder) if holder else site.body.module).training = training
    site.body.view.root.get_submodule(site.owner).training = training


def write_literal(site: Site, training: bool) -> set[nn.Module]:
    """Writes a mode into a site as a literal; returns the modules whose graphs it has edited."""
    make_one_node(site)
    if site.op.flag is not None:
        if training and site.op.p is not None and site.p != site.read(site.op.p):
            set_argument(site, site.op.p, site.p)  # supplied by someone who knows
        set_argument(site, site.op.flag, training)
    elif training and site.op.p is None:
        insert_dropout(site, float(site.p or 0.0), True)
    elif training:
        set_argument(site, str(site.op.p), site.p)
        loosen_views(site.node)
    else:
        add_note(site.node, p=site.p)  # the way back to train; the literal is the only other place that knows
        set_argument(site, str(site.op.p), 0.0)
        loosen_views(site.node)
    edited = {site.body.module}
    if site.step is not None:
        calls.set_counter(site.step, training)
        edited.add(_owner_of_graph(site, site.step))
        site.step = site.step if training else None
    elif training and site.counter_at is not None:
        site.step = insert_step(site.counter_at, True)
        edited.add(site.counter_at.body.module)
    return edited


def make_one_node(site: Site) -> None:
    """Folds the nodes of a site that is a region into one that carries its mode."""
    if site.region is not None:
        site.node, site.region = fold(site.region, site.body), None


def _owner_of_graph(site: Site, node: fx.Node) -> nn.Module:
    return site.body.view.body(node).module
