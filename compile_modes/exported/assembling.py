"""The module of both modes, from the exports of a model: one graph with flags and switches, or two programs."""

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes.errors import ExportError, few
from compile_modes.exported.arguments import take_names
from compile_modes.exported.exporter import Exporter
from compile_modes.exported.known import bind_known, bind_merged
from compile_modes.exported.pairing import Pairing, pair
from compile_modes.exported.provenance import Source, set_flags
from compile_modes.exported.switching.deciders import Explored, Witness, chain, depth_vector, explore, fresh
from compile_modes.exported.switching.switches import OneGraph, differing
from compile_modes.exported.switching.traces import Unmatched, trace
from compile_modes.exported.two_programs import Side, explore_side, two, two_of_sides
from compile_modes.graph.dual import DualModule, share
from compile_modes.graph.finding import sites
from compile_modes.graph.folding import fold


def assemble(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    modes: Mapping[str, bool],
    between: Mapping[int, ExportedProgram] | None = None,
    witnesses: Sequence[Witness] = (),
    sides: Sequence[Side] = (),
    *,
    exporter: Exporter | None = None,
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
        witnesses: exports in yet other modes, to compare with.
        sides: exports of two programs with submodules in other modes than the root's, if there are any.
        exporter: makes such exports, where they are needed.
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
    unclear = exporter.unclear(*roots) if exporter is not None else set()
    if unclear and not difference:
        difference = f"what follows the mode of {', '.join(map(repr, sorted(unclear)))}"
    if not together or between or witnesses:
        difference = difference or "what they do where submodules are in different modes"
    explored: Explored | None = None
    graphs: list[OneGraph] | None = None
    module: nn.Module | None = None if difference else _single(roots[0], found)
    if difference and together:
        try:
            if exporter is not None:
                explored = _explored(exporter, roots, unclear)
                between, witnesses, followers = explored.programs, explored.witnesses, explored.deciders
                readers = exporter.readers
            graph = _merged(roots, between, witnesses, readers, guess)
            plain = not found.difference and graph.follows_owners  # masks, and whose they are is known now
            module = _single(roots[0], found) if plain else _switched(roots, graph)
        except Unmatched as why:
            together, difference = False, f"{difference}; {why}" if str(why) not in difference else difference
            if exporter is not None and explored is not None:
                unclear = exporter.unclear(*roots)
                followers = explored.deciders | why.owners | (exporter.readers if why.owners else unclear)
                sides, graphs = _sides(exporter, (train, evaluation), unclear) if followers - {""} else ([], [])
                followers = set() if sides else followers
    if module is None:
        graphs = [side.merged(readers) for side in sides] if graphs is None else graphs
        module = _two(train, evaluation, difference, witnesses, graphs, forward)
        module.follow(_owners(train, evaluation) if followers is None else followers)
    set_flags(module, modes)
    programs = {"train": train, "eval": evaluation, **{f"depth_{depth}": p for depth, p in between.items()}}
    seen = {f"witness_{i}": witness for i, witness in enumerate(witnesses)}
    for side in sides:
        name = "train" if side.mode else "eval"
        programs |= {f"{name}_depth_{depth:g}": p for depth, p in side.programs.items()}
        seen |= {f"{name}_witness_{i}": witness for i, witness in enumerate(side.witnesses)}
    programs |= {name: witness.program for name, witness in seen.items()}
    asleep = {name: sorted(witness.asleep) for name, witness in seen.items()}
    known: dict[str, Any] = {"together": together, "guess": guess, "followers": followers, "readers": readers}
    Source(programs, asleep=asleep, **known).stay_with(module)
    return module


def reassemble(
    programs: Mapping[str, ExportedProgram], modes: Mapping[str, bool], known: Mapping[str, Any]
) -> nn.Module:
    """:func:`assemble` from the programs of a :class:`Source`, by their names there."""
    known = dict(known)
    asleep = known.pop("asleep", {})

    def by_depth(start: str) -> dict[float, ExportedProgram]:
        names = [name for name in programs if name.startswith(start)]
        return {float(name.removeprefix(start)): programs[name] for name in names}

    def witnesses(start: str) -> list[Witness]:
        return [Witness(programs[name], frozenset(names)) for name, names in asleep.items() if name.startswith(start)]

    between = {int(depth): program for depth, program in by_depth("depth_").items()}
    named = {"train": True, "eval": False}
    sides = [Side(mode, by_depth(f"{name}_depth_"), witnesses(f"{name}_witness")) for name, mode in named.items()]
    sides = [side for side in sides if side.programs]
    return assemble(programs["train"], programs["eval"], modes, between, witnesses("witness"), sides, **known)


def _sides(
    exporter: Exporter, programs: tuple[ExportedProgram, ExportedProgram], unclear: Collection[str]
) -> tuple[list[Side], list[OneGraph]]:
    """What two programs can know of submodules that decide, and the graphs of that; nothing if it can't be told."""
    try:
        sides = [
            explore_side(exporter.model, mode, program, exporter.probe, exporter.readers, unclear)
            for mode, program in zip((True, False), programs, strict=True)
        ]
        return sides, [side.merged(exporter.readers) for side in sides]
    except (Unmatched, ExportError):
        return [], []


def _two(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    difference: str,
    witnesses: Sequence[Witness],
    graphs: Sequence[OneGraph],
    forward: inspect.Signature | None,
) -> DualModule:
    if graphs:
        for graph in graphs:
            take_names(graph.root, forward)
        ours, theirs = graphs
        return two_of_sides(ours, theirs, difference)
    roots = fresh(train), fresh(evaluation)
    for root in roots:
        take_names(root, forward)
    return two(*roots, difference, witnesses)


def _explored(exporter: Exporter, roots: tuple[fx.GraphModule, fx.GraphModule], unclear: Collection[str]) -> Explored:
    traces = trace(roots[1], depth_vector(-1)), trace(roots[0], depth_vector(math.inf))
    try:
        return explore(exporter.model, *traces, exporter.probe, exporter.readers, unclear=unclear)
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
    witnesses: Sequence[Witness],
    readers: Collection[str] | None,
    guess: bool,
) -> OneGraph:
    """The programs as one, compared with exports in other modes.

    Raises:
        Unmatched: they can't be one, or not one that agrees with another export.
    """
    train, evaluation = roots
    seen = [(witness.vector, fresh(witness.program)) for witness in witnesses]
    return OneGraph(chain(dict(between), evaluation, train), seen, readers=readers, guess=guess)


def _switched(roots: tuple[fx.GraphModule, fx.GraphModule], graph: OneGraph) -> nn.Module:
    """Binds the train program as the merged one."""
    train, evaluation = roots
    share(train, evaluation)
    return bind_merged(train, graph.emit())


def _single(root: nn.Module, found: Pairing) -> nn.Module:
    """Binds the train program as the pairing says."""
    return bind_known(
        root,
        found,
        [fold(region, body) for region, body in found.left_out],
        counts_in_both=lambda site: site.step in found.kept_steps,
        counts_in_train=lambda site: site.step in found.left_out_steps,
    )


def say_guessed(module: nn.Module) -> None:
    """Warns of switches whose modules were guessed."""
    names = set() if isinstance(module, DualModule) else {s.owner for s in sites(module) if s.op.family == "switch"}
    if names:
        messages.GUESSED.warn(modules=few(map(repr, sorted(names))))
