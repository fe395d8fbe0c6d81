"""Finds the mode-dependent sites of a view: each node that the table knows, its owner, its mode, its counter."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import messages
from compile_modes.graph import calls
from compile_modes.graph.dual import DualModule
from compile_modes.graph.flags import mode_of, without_dropout, without_stats
from compile_modes.graph.functional import kept_call
from compile_modes.graph.ops import LOST_DROPOUT, LOST_ITERATION, STUCK_ITERATION, TABLE, UNTRACKED, ModeOp, lookup
from compile_modes.graph.owners import is_batch_norm, join
from compile_modes.graph.regions import Region, iterations, regions
from compile_modes.graph.sites import HARD_CODED, KEPT, Reach, Site, note
from compile_modes.graph.view import Body, View, attribute


def sites(obj: Any) -> list[Site]:
    """The mode-dependent sites of an exported or captured program, in graph order.

    Args:
        obj: an ExportedProgram, a GraphModule (exported, bound, captured or PT2E-prepared), an UnflattenedModule, what
            :func:`compile_modes.export` returns, or an OptimizedModule around one of these.

    Raises:
        BindError: ``obj`` holds no graph.
    """
    return [site for root in graph_roots(obj) for site in find(View(root))]


def find(view: View) -> list[Site]:
    """The sites of a view, in graph order, as they are when it is first asked for them."""
    return view.once(_find, view)


def _find(view: View) -> list[Site]:
    found = [site for body in view.bodies for site in _sites_of(body)]
    _attach_counters(view, found)
    return found


def graph_roots(obj: Any) -> list[nn.Module]:
    """:func:`graph_root` of all programs that ``obj`` holds, train first."""
    module = getattr(obj, "_orig_mod", obj)
    return [module.program(True), module.program(False)] if isinstance(module, DualModule) else [graph_root(obj)]


def _sites_of(body: Body) -> list[Site]:
    if body.gated:
        return []  # the call that runs it is the site
    if body.branch:  # two exports tell what is in a branch; nothing need be guessed of it
        return [_site(body, n, row) for n in body.graph.nodes if n.op == "call_function" and (row := lookup(n.target))]
    special = {r.node: _site_without_flag(body, r.node, TABLE[r.gate], True, r) for r in regions(body) if r.covers}
    for node, live in iterations(body):
        special[node] = _site_without_flag(body, node, STUCK_ITERATION if live else LOST_ITERATION, live)
    for node in without_dropout(body):
        special[node] = _site_without_flag(body, node, LOST_DROPOUT, False)
    found = []
    for node in body.graph.nodes:
        if node in special:
            found.append(special[node])
        elif node.op == "call_function" and (row := lookup(node.target) or kept_call(node)) is not None:
            found.append(_site(body, node, row))
    return found


def _site_without_flag(body: Body, node: fx.Node, row: ModeOp, training: bool, region: Region | None = None) -> Site:
    hard_coded = note(node).get("mode") == HARD_CODED
    return Site(node, body, row, body.view.owner[node], training, False, False, hard_coded, region=region)


def graph_root(obj: Any) -> nn.Module:
    """The module with a graph that ``obj`` is or stands for."""
    if isinstance(obj, torch.export.ExportedProgram):
        return obj.module()
    module = getattr(obj, "_orig_mod", obj)
    if isinstance(module, fx.GraphModule | UnflattenedModule):
        return module
    if isinstance(module, DualModule):
        raise messages.TWO_PROGRAMS.error()
    raise messages.NO_GRAPH.error(kind=type(module).__name__)


def _site(body: Body, node: fx.Node, row: ModeOp) -> Site:
    view, owner = body.view, body.view.owner[node]
    modeless = row.modeless or without_stats(node, row)
    if modeless and row.counter and _has_statistics(view, owner):
        return _site_without_flag(body, node, UNTRACKED, True)
    training, flag = (None, None) if modeless else mode_of(body, node, row)
    hard_coded, inverted = note(node).get("mode") == HARD_CODED, flag is not None and flag.target is operator.not_
    site = Site(node, body, row, owner, training, modeless, flag is not None, hard_coded, inverted)
    if row.stats and (stats := view.state[site.read(row.stats[0])]):
        home = stats.rpartition(".")[0]
        # Bodies of regions that Dynamo retraced know no submodule of their nodes any more; statistics have a home.
        lost = site.owner == "" and "nn_module_stack" in node.meta and view.from_dynamo
        site.owner = home if lost else site.owner
        # Functional batch norm has no counter, also on a batch norm module's buffers.
        counts = is_batch_norm(node)
        if row.counter and (lost or (site.owner == home if counts is None else counts)):
            site.counter = join(home, "num_batches_tracked")
    return site


def _has_statistics(view: View, owner: str) -> bool:
    """Whether a batch norm that uses batch statistics has running ones: eager uses those in eval."""
    return isinstance(attribute(view.root, join(owner, "running_mean")), torch.Tensor)


def _attach_counters(view: View, found: Iterable[Site]) -> None:
    """Pairs each batch norm with its counter's step, or finds out where a step could stand."""
    steps: dict[str, list[fx.Node]] = {}
    for node in view.nodes():
        own_step = calls.is_counter(node) and note(node).get("mode") != KEPT
        if own_step and (path := view.state[node.args[0]]) is not None:
            steps.setdefault(path, []).append(node)
    by_counter: dict[str, list[Site]] = {}
    for site in found:
        if site.counter is not None:
            by_counter.setdefault(site.counter, []).append(site)
    for path, users in by_counter.items():
        own = steps.get(path, [])
        # Each call in train has a step just before it. As many steps as calls although some are in eval: a graph
        # whose flags other tools have flipped without minding the counter.
        stepping = users if len(own) >= len(users) else [s for s in users if s.training or s.bound]
        for site, step in zip(stepping, own, strict=False):
            site.step = step
        for site in users:
            if site.step is None and site.training:
                site.counter = None  # trains without counting: whatever its owner is, it does not count
            elif site.step is None:
                site.counter_at = _reach(site.body, site.node, path)
                if site.counter_at is None and not _may_have_counter(view, site, path):
                    site.counter = None


def _may_have_counter(view: View, site: Site, counter: str) -> bool:
    """False if the module at hand shows that its batch norm keeps no counter (functional use, own buffers)."""
    mean = view.state[site.read(site.op.stats[0])]
    # Dynamo's graphs take buffers as inputs, so that the root's lack of a counter says nothing there.
    return mean is None or attribute(view.root, mean) is None or attribute(view.root, counter) is not None


def _reach(body: Body, node: fx.Node, path: str) -> Reach | None:
    """From where the buffer at ``path`` can be read: as an operand of a graph, or as an attribute of its module."""
    while True:
        if (placeholder := body.view.inputs[body].get(path)) is not None:
            return Reach(body, node, placeholder)
        local = path.removeprefix(body.path + ".") if body.path else path
        inside = not body.path or local != path
        if inside and attribute(body.module, local) is not None:
            return Reach(body, node, local)
        caller = body.caller
        if body.parent is None or caller is None or not body.always:
            return None
        body, node = body.parent, caller
