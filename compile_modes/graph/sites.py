"""Mode-dependent sites of a graph: which op, whose, in which mode, and what can be done about it."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import _compat
from compile_modes.errors import BindError
from compile_modes.graph import calls
from compile_modes.graph.bodies import (
    Body,
    attribute,
    bodies,
    from_dynamo,
    is_batch_norm,
    join,
    module_class,
    module_path,
    state_path,
)
from compile_modes.graph.dual import DualModule
from compile_modes.graph.flags import mode_of, without_dropout, without_stats
from compile_modes.graph.functional import kept_call
from compile_modes.graph.ops import LOST_DROPOUT, LOST_ITERATION, STUCK_ITERATION, TABLE, UNTRACKED, ModeOp, lookup
from compile_modes.graph.regions import Region, iterations, regions

# Node meta that export, Dynamo and AOTAutograd carry along (``custom``), under this key.
NOTES = "compile_modes"
HARD_CODED, KEPT = "hard-coded", "kept"
BOUND = "compile_modes_bound"  # in the meta of a GraphModule that bind() has seen
REMARKS = "compile_modes_remarks"  # there too: what depends on mode and is no site, a line each for explain()


@dataclass(frozen=True, eq=False)
class Reach:
    """A graph that can read a counter, the node there before which to step it, and the counter's node or attribute."""

    body: Body
    anchor: fx.Node
    counter: fx.Node | str


@dataclass(eq=False)
class Site:
    """One node whose result or side effects depend on mode.

    Attributes:
        node: the node, and ``body`` the graph that it stands in.
        op: the table's row.
        owner: dotted path of the submodule whose ``training`` decides (``""`` for the root).
        training: the mode it is in; None if it has none (``modeless``) or computes it.
        modeless: whether it does the same in both modes, such as a batch norm without running statistics.
        bound: whether it reads its owner's ``training`` instead of a literal.
        hard_coded: whether :func:`compile_modes.bind` found its literal at odds with its owner's other sites.
        inverted: whether it is in train while its owner's flag says eval (``F.dropout(x, p, not self.training)``).
        region: the nodes that the site consists of, if they are not folded into ``node`` yet.
        counter: attribute path of the ``num_batches_tracked`` that eager advances beside it in train, if any.
        step: the node that advances the counter.
        counter_at: without a step, where one could stand.
    """

    node: fx.Node
    body: Body
    op: ModeOp
    owner: str
    training: bool | None
    modeless: bool
    bound: bool
    hard_coded: bool
    inverted: bool = False
    region: Region | None = None
    counter: str | None = None
    step: fx.Node | None = None
    counter_at: Reach | None = None

    def read(self, name: str) -> Any:
        """The operand for argument ``name`` of the op's schema."""
        return self.op.read(self.node.args, dict(self.node.kwargs), name)

    @property
    def p(self) -> float | None:
        """Probability in train mode; None if the op has none or the graph has lost it."""
        if self.op.p is None:
            return note(self.node).get("p") if self.op is LOST_DROPOUT else None
        value: float | None = self.read(self.op.p)
        if self.op.flag is None and isinstance(value, fx.Node) and self.bound:
            return value.args[1]
        return value or note(self.node).get("p", value if self.op.flag else None)

    @property
    def lacks_p(self) -> bool:
        """Whether Python may have chosen a probability of 0 for eval, as it does for attention; modules keep theirs."""
        named = issubclass(module_class(self.node) or object, _compat.DROPOUT)
        return not self.p and (self.op.flag is None or (self.op.family == "dropout" and not named))

    @property
    def literals(self) -> dict[str, Any]:
        """What the op is set to besides its mode: probability, or momentum and eps."""
        shown = {} if self.op.p is None else {"p": self.p}
        return shown | {name: self.read(name) for name in self.op.shown}

    def refusal(self, training: bool) -> str:
        """Why the site cannot be put into the given mode; empty if it can."""
        if self.modeless or self.training is training:
            return ""
        if self.op is LOST_DROPOUT and self.p:
            return ""  # supplied by someone who knows
        if self.op.refusal:
            return note(self.node).get("refusal") or self.op.refusal
        if self.training is None:
            return f"its {self.op.flag or self.op.p} is computed in the graph"
        if not training or self.bound:
            return ""
        return self._not_to_train()

    def _not_to_train(self) -> str:
        if self.lacks_p:
            return f"{self.op.p} is 0: the op had none, or it was traced in eval mode and its p is lost"
        if self.op.counter and self.read(self.op.shown[0]) == 0:
            return "momentum 0.0 in an eval graph: a cumulative average looks the same; export under exportable(model)"
        if self.op.stats and not self.body.runs_once:
            return "it would write its statistics inside a branch, a loop or a nested compile region"
        if self.counter and self.step is None and self.counter_at is None:
            return f"{self.counter} is out of the graph's reach, so train could not advance it"
        return ""

    def __str__(self) -> str:
        mode = {True: "train", False: "eval", None: "no mode"}[self.training]
        return f"{self.node.name} ({self.op}, owner {self.owner!r}, {mode})"


def note(node: fx.Node) -> dict[str, Any]:
    """What this package has noted on a node; survives deepcopy, export and Dynamo."""
    noted: dict[str, Any] = (node.meta.get("custom") or {}).get(NOTES, {})
    return noted


def add_note(node: fx.Node, **items: Any) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), NOTES: {**note(node), **items}}


def sites(obj: Any) -> list[Site]:
    """The mode-dependent sites of an exported or captured program, in graph order.

    Args:
        obj: an ExportedProgram, a GraphModule (exported, bound, captured or PT2E-prepared), an UnflattenedModule, what
            :func:`compile_modes.export` returns, or an OptimizedModule around one of these.

    Raises:
        BindError: ``obj`` holds no graph.
    """
    found = []
    for root in graph_roots(obj):
        graphs = bodies(root)
        here = [site for body in graphs for site in _sites_of(body)]
        _attach_counters(root, graphs, here)
        found += here
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
    return Site(node, body, row, module_path(node), training, False, False, hard_coded, region=region)


def graph_root(obj: Any) -> nn.Module:
    """The module with a graph that ``obj`` is or stands for."""
    if isinstance(obj, torch.export.ExportedProgram):
        return obj.module()
    module = getattr(obj, "_orig_mod", obj)
    if isinstance(module, fx.GraphModule | UnflattenedModule):
        return module
    if isinstance(module, DualModule):
        raise BindError(
            "the module holds two programs, one for each mode",
            remedy="use module.program(True) or module.program(False)",
        )
    raise BindError(
        f"{type(module).__name__} has no graph of ATen ops",
        remedy="export it first: torch.export.export(model, args); an eager module needs no binding",
    )


def _site(body: Body, node: fx.Node, row: ModeOp) -> Site:
    kwargs = dict(node.kwargs)
    modeless = row.modeless or without_stats(node, row)
    if modeless and row.counter and _has_statistics(body, module_path(node)):
        return _site_without_flag(body, node, UNTRACKED, True)
    training, flag = (None, None) if modeless else mode_of(body, node, row)
    hard_coded, inverted = note(node).get("mode") == HARD_CODED, flag is not None and flag.target is operator.not_
    site = Site(node, body, row, module_path(node), training, modeless, flag is not None, hard_coded, inverted)
    if row.stats and (stats := state_path(body, row.read(node.args, kwargs, row.stats[0]))):
        home = stats.rpartition(".")[0]
        # Bodies of regions that Dynamo retraced know no submodule of their nodes any more; statistics have a home.
        lost = site.owner == "" and "nn_module_stack" in node.meta and from_dynamo(body)
        site.owner = home if lost else site.owner
        # Functional batch norm has no counter, also on a batch norm module's buffers.
        counts = is_batch_norm(node)
        if row.counter and (lost or (site.owner == home if counts is None else counts)):
            site.counter = join(home, "num_batches_tracked")
    return site


def _has_statistics(body: Body, owner: str) -> bool:
    """Whether a batch norm that uses batch statistics has running ones: eager uses those in eval."""
    while body.parent is not None:
        body = body.parent
    return isinstance(attribute(body.module, join(owner, "running_mean")), torch.Tensor)


def _attach_counters(root: nn.Module, graphs: Iterable[Body], found: Iterable[Site]) -> None:
    """Pairs each batch norm with its counter's step, or finds out where a step could stand."""
    steps: dict[str, list[fx.Node]] = {}
    for body in graphs:
        for node in body.graph.nodes:
            if (
                calls.is_counter(node)
                and note(node).get("mode") != KEPT
                and (path := state_path(body, node.args[0])) is not None
            ):
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
                if site.counter_at is None and not _may_have_counter(root, site, path):
                    site.counter = None


def _may_have_counter(root: nn.Module, site: Site, counter: str) -> bool:
    """False if the module at hand shows that its batch norm keeps no counter (functional use, own buffers)."""
    mean = state_path(site.body, site.read(site.op.stats[0]))
    # Dynamo's graphs take buffers as inputs, so that the root's lack of a counter says nothing there.
    return mean is None or attribute(root, mean) is None or attribute(root, counter) is not None


def _reach(body: Body, node: fx.Node, path: str) -> Reach | None:
    """From where the buffer at ``path`` can be read: as an operand of a graph, or as an attribute of its module."""
    while True:
        for placeholder in body.graph.find_nodes(op="placeholder"):
            if state_path(body, placeholder) == path:
                return Reach(body, node, placeholder)
        local = path.removeprefix(body.path + ".") if body.path else path
        inside = not body.path or local != path
        if inside and attribute(body.module, local) is not None:
            return Reach(body, node, local)
        caller = body.caller
        if body.parent is None or caller is None or not body.always:
            return None
        body, node = body.parent, caller
