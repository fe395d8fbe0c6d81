"""The module of both modes, from the exports of a model: one graph with flags and switches, or two programs."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes.errors import ExportError
from compile_modes.exported.arguments import take_names
from compile_modes.exported.binding import carry_out
from compile_modes.exported.pairing import Pairing, pair
from compile_modes.exported.planning import Plan, plan_binding
from compile_modes.exported.provenance import Source, set_flags
from compile_modes.exported.switching.deciders import Explored, Probe, Witness, chain, depth_vector, explore, fresh
from compile_modes.exported.switching.switches import Merged, OneGraph, differing
from compile_modes.exported.switching.traces import Unmatched, trace
from compile_modes.graph.dual import DualModule, share
from compile_modes.graph.edits import hoist_constants
from compile_modes.graph.finding import find, sites
from compile_modes.graph.folding import fold
from compile_modes.graph.sites import HARD_CODED, KEPT, Site, add_note
from compile_modes.graph.view import View


@dataclass(frozen=True)
class Explorer:
    """A model that is at hand, to be exported in more modes.

    Attributes:
        model: the model.
        probe: exports it.
        readers: the modules whose mode it has read in the exports so far.
    """

    model: nn.Module
    probe: Probe
    readers: Collection[str]


def assemble(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    modes: Mapping[str, bool],
    between: Mapping[int, ExportedProgram] | None = None,
    witness: Witness | None = None,
    *,
    explorer: Explorer | None = None,
    forward: inspect.Signature | None = None,
    guess: bool = False,
    together: bool = True,
    followers: Collection[str] | None = None,
    readers: Collection[str] | None = None,
) -> nn.Module:
    """The module of both modes.

    Args:
        train, evaluation: the two exports.
        modes: those it starts with, by submodule.
        between: exports with modules training down to some depth.
        witness: the export that shows what runs in eval only, if there is one.
        explorer: makes such exports, where they are needed.
        forward: the signature of the model, if it is at hand.
        guess: whether to take the owners of ops for the modules that decide about them, without such exports.
        together: False if it is known that the two programs can't be one graph.
        followers: modules that decide by their own mode, as far as known; those of all that differs if None.
        readers: the modules whose mode the model reads; None if that isn't known.
    """
    roots = fresh(train), fresh(evaluation)
    found = pair(*roots)
    for root in roots:
        take_names(root, forward)
    between, difference = dict(between or {}), found.difference or found.unclear
    explored: Explored | None = None
    module: nn.Module | None = None if difference else _single(roots[0], found)
    if difference and together:
        try:
            if explorer is not None:
                explored = _explored(explorer, roots)
                between, witness, followers = explored.programs, explored.witness, explored.deciders
                readers = explorer.readers
            graph = _merged(roots, between, witness, explored, readers, guess)
            plain = not found.difference and graph.follows_owners  # masks, and whose they are is known now
            module = _single(roots[0], found) if plain else _switched(roots, graph)
        except Unmatched as why:
            together, difference = False, f"{difference}; {why}" if str(why) not in difference else difference
            if explorer is not None and explored is not None:
                unclear = set(explorer.readers) - (set() if why.owners else _with_sites(*roots))
                followers = explored.deciders | unclear
            roots = fresh(train), fresh(evaluation)
            for root in roots:
                take_names(root, forward)
    if module is None:
        module = _dual(*roots, difference, witness)
        module.follow(_owners(train, evaluation) if followers is None else followers)
    set_flags(module, modes)
    programs = {"train": train, "eval": evaluation, **{f"depth_{depth}": p for depth, p in between.items()}}
    deciders: Collection[str] = ()
    if witness is not None:
        programs["witness"], deciders = witness.program, witness.deciders
    known: dict[str, Any] = {"together": together, "guess": guess, "followers": followers, "readers": readers}
    Source(programs, deciders=deciders, **known).stay_with(module)
    return module


def reassemble(
    programs: Mapping[str, ExportedProgram], modes: Mapping[str, bool], known: Mapping[str, Any]
) -> nn.Module:
    """:func:`assemble` from the programs of a :class:`Source`, by their names there."""
    names = [name for name in programs if name.startswith("depth_")]
    between = {int(name.removeprefix("depth_")): programs[name] for name in names}
    known = dict(known)
    deciders = frozenset(known.pop("deciders", ()))
    witness = Witness(programs["witness"], deciders) if "witness" in programs else None
    return assemble(programs["train"], programs["eval"], modes, between, witness, **known)


def _explored(explorer: Explorer, roots: tuple[fx.GraphModule, fx.GraphModule]) -> Explored:
    traces = trace(roots[1], depth_vector(-1)), trace(roots[0], depth_vector(math.inf))
    try:
        return explore(explorer.model, *traces, explorer.probe, explorer.readers)
    except ExportError as error:
        raise Unmatched(f"no export in which modules are in different modes: {error.cause}") from error


def _owners(train: ExportedProgram, evaluation: ExportedProgram) -> set[str]:
    """The modules in which two programs differ, any of which may be the one that decides."""
    try:
        ops = differing(trace(fresh(evaluation), depth_vector(-1)), trace(fresh(train), depth_vector(math.inf)))
    except Unmatched:
        return set()
    return {op.owner for op in ops}


def _merged(
    roots: tuple[fx.GraphModule, fx.GraphModule],
    between: Mapping[int, ExportedProgram],
    witness: Witness | None,
    explored: Explored | None,
    readers: Collection[str] | None,
    guess: bool,
) -> OneGraph:
    """The programs as one, compared with exports in other modes.

    Raises:
        Unmatched: they can't be one, or not one that agrees with another export.
    """
    train, evaluation = roots
    seen = (witness.vector, fresh(witness.program)) if witness is not None else None
    graph = OneGraph(chain(dict(between), evaluation, train), seen, readers=readers, guess=guess)
    for vector, root in explored.checks if explored is not None else ():
        graph.compare(root, vector)
    return graph


def _with_sites(*roots: fx.GraphModule) -> set[str]:
    """The modules that have a use for their mode which is known."""
    return {site.owner for root in roots for site in sites(root)}


def _switched(roots: tuple[fx.GraphModule, fx.GraphModule], graph: OneGraph) -> nn.Module:
    """Binds the train program as the merged one."""
    train, evaluation = roots
    share(train, evaluation)
    merged = graph.emit()
    return _carry_out(
        train,
        merged,
        merged.switches,
        lost=merged.lost,
        counts_in_both=lambda site: site.node in merged.kept_steps,
        counts_in_train=lambda site: site.node in merged.counting,
    )


def _single(root: nn.Module, found: Pairing) -> nn.Module:
    """Binds the train program as the pairing says."""
    return _carry_out(
        root,
        found,
        [fold(region, body) for region, body in found.left_out],
        counts_in_both=lambda site: site.step in found.kept_steps,
        counts_in_train=lambda site: site.step in found.left_out_steps,
    )


def _carry_out(
    root: nn.Module,
    found: Pairing | Merged,
    calls: Sequence[fx.Node],
    *,
    lost: Mapping[fx.Node, float] | None = None,
    counts_in_both: Callable[[Site], bool],
    counts_in_train: Callable[[Site], bool],
) -> nn.Module:
    """Binds a train program of which both exports are known.

    Args:
        root: the module of the program.
        found: which sites follow their owner's flag, which its reverse, and which none.
        calls: further nodes that follow it: folded regions and switches.
        lost: probabilities that nodes have in train and don't show.
        counts_in_both: whether the counter of a site steps in both modes.
        counts_in_train: whether that of a site with a literal steps in train only.
    """
    view = View(root)
    by_node = {site.node: site for site in find(view)}
    bindable = [by_node[node] for node in (*found.bound, *found.inverted, *calls)]
    for site in by_node.values():
        if site.step is not None and counts_in_both(site):  # the model's own statement
            add_note(site.step, mode=KEPT)
            site.step = None
    odd = [by_node[node] for node in found.fixed]
    odd += [site for site in by_node.values() if site.region is not None]  # a mask that eval has as well
    probabilities = {by_node[node]: p for node, p in {**found.inverted, **(lost or {})}.items() if p is not None}
    plan = _plan(view, bindable, odd, {by_node[node] for node in found.inverted}, probabilities)
    plan.counting = [site for site in odd if site.step is not None and counts_in_train(site)]
    carry_out(plan)
    return root


def _plan(view: View, bindable: list[Site], odd: list[Site], inverted: set[Site], supplied: dict[Site, float]) -> Plan:
    modes = {site.owner: True for site in bindable}
    return Plan(view, True, True, modes, bindable, [], odd, set(), supplied=supplied, inverted=inverted)


def _dual(train: Any, evaluation: Any, difference: str, witness: Witness | None) -> DualModule:
    """Binds both programs to the same flags."""
    for root, mode in ((train, True), (evaluation, False)):
        for site in sites(root):
            if site.training is (not mode):  # all flags had the program's mode, so this is no flag
                add_note(site.node, mode=HARD_CODED)
    lost = _compare_by_owner(train, evaluation)
    if witness is not None:
        lost = {**_compare_by_owner(fresh(witness.program), evaluation), **lost}
    carry_out(plan_binding(View(train), ()))
    for root in (train, evaluation):
        hoist_constants(root)
    share(train, evaluation)
    carry_out(plan_binding(View(evaluation), (), lost))
    return DualModule(train, evaluation, difference)


def _compare_by_owner(train: nn.Module, evaluation: nn.Module) -> dict[str, float]:
    """What programs that can't be paired say of each other, site by site within an owner that has the same in both.

    Notes flags of the train program that are hard-coded; returns the attention dropout that the eval program has lost.
    """
    lost: dict[str, set[float]] = {}
    grouped: list[dict[tuple[str, str], list[Site]]] = [{}, {}]
    for groups, root in zip(grouped, (train, evaluation), strict=True):
        for site in sites(root):
            groups.setdefault((site.owner, site.op.family), []).append(site)
    for key, ours in grouped[0].items():
        theirs: Sequence[Site] = grouped[1].get(key, ())
        for a, b in zip(ours, theirs, strict=False) if len(ours) == len(theirs) else ():
            if a.training is b.training is not None:
                add_note(a.node, mode=HARD_CODED)
            elif a.op.family == "attention" and a.p:
                lost.setdefault(a.owner, set()).add(a.p)
    return {owner: probabilities.pop() for owner, probabilities in lost.items() if len(probabilities) == 1}


def say_guessed(module: nn.Module) -> None:
    """Warns of switches whose modules were guessed."""
    names = set() if isinstance(module, DualModule) else {s.owner for s in sites(module) if s.op.family == "switch"}
    if names:
        shown = ", ".join(map(repr, sorted(names)[:5])) + (", ..." if len(names) > 5 else "")
        messages.GUESSED.warn(modules=shown)
