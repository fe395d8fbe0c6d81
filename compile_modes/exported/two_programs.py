"""Two programs over one set of weights, where one graph can't be: what each of them knows of its submodules' modes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from compile_modes.exported.binding import carry_out
from compile_modes.exported.known import bind_merged
from compile_modes.exported.planning import plan_binding
from compile_modes.exported.switching.deciders import Explored, Probe, Witness, chain, depth_vector, explore, fresh
from compile_modes.exported.switching.switches import OneGraph
from compile_modes.exported.switching.traces import trace
from compile_modes.graph.dual import DualModule, share
from compile_modes.graph.edits import hoist_constants
from compile_modes.graph.finding import sites
from compile_modes.graph.sites import HARD_CODED, Site, add_note
from compile_modes.graph.view import View


@dataclass
class Side:
    """Exports in one mode of the root, and others of its submodules.

    Attributes:
        mode: the mode of the root.
        programs: by the depth down to which submodules trained; 0 for none, infinite for all.
        witnesses: programs in yet other modes, to compare with.
    """

    mode: bool
    programs: dict[float, ExportedProgram]
    witnesses: Sequence[Witness] = ()

    def merged(self, readers: Collection[str] | None) -> OneGraph:
        """The programs as one.

        Raises:
            Unmatched: they can't be one.
        """
        seen = [(witness.vector, fresh(witness.program)) for witness in self.witnesses]
        between = {int(d): p for d, p in self.programs.items() if 0 < d < math.inf}
        ends = fresh(self.programs[0]), fresh(self.programs[math.inf])
        graph = OneGraph(chain(between, *ends, self.mode), seen, readers=readers)
        share(graph.root, ends[0])
        return graph


def explore_side(
    model: nn.Module,
    mode: bool,
    program: ExportedProgram,
    probe: Probe,
    readers: Collection[str],
    unclear: Collection[str],
) -> Side:
    """Exports a model, with its root in one mode, until it is told which submodule decides about each op.

    Args:
        model: the eager module.
        mode: the mode of the root.
        program: the export in which all modules are in that mode.
        probe: exports the model in other modes.
        readers: the modules whose mode the model reads.
        unclear: those of which it isn't known what for.

    Raises:
        Unmatched: it can't be told.
        ExportError: an export fails.
    """
    other = probe(lambda name: not mode if name else mode)
    ends = {0.0: other, math.inf: program} if mode else {0.0: program, math.inf: other}
    low, high = (trace(fresh(p), depth_vector(depth, mode)) for depth, p in ends.items())
    found: Explored = explore(model, low, high, probe, readers, mode, unclear)
    return Side(mode, ends | {float(d): p for d, p in found.programs.items()}, found.witnesses)


def two_of_sides(train: OneGraph, evaluation: OneGraph, difference: str) -> DualModule:
    """Binds both programs, each with switches by its submodules' flags."""
    graphs = train.emit(), evaluation.emit()
    bind_merged(train.root, graphs[0])
    for root in (train.root, evaluation.root):
        hoist_constants(root)
    share(train.root, evaluation.root)
    bind_merged(evaluation.root, graphs[1])
    return DualModule(train.root, evaluation.root, difference)


def two(train: Any, evaluation: Any, difference: str, witnesses: Sequence[Witness]) -> DualModule:
    """Binds both programs to the same flags."""
    for root, mode in ((train, True), (evaluation, False)):
        for site in sites(root):
            if site.training is (not mode):  # all flags had the program's mode, so this is no flag
                add_note(site.node, mode=HARD_CODED)
    lost = _compare_by_owner(train, evaluation)
    for witness in witnesses:
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
