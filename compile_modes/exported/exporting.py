"""``export``: both modes of an eager model, in one graph with flags where that is exact, in two graphs otherwise."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import _compat
from compile_modes.errors import ExportError
from compile_modes.exported.assigned import keeping_assignments
from compile_modes.exported.binding import carry_out
from compile_modes.exported.deciders import Explored, Probe, chain, depth_vector, explore, fresh
from compile_modes.exported.pairing import Pairing, pair
from compile_modes.exported.planning import Plan, plan_binding
from compile_modes.exported.provenance import Source, flags, set_flags
from compile_modes.exported.switches import OneGraph, differing
from compile_modes.exported.traces import Unmatched, Vector, trace
from compile_modes.graph.bodies import hoist_constants
from compile_modes.graph.cumulative import exportable
from compile_modes.graph.dual import DualModule, share
from compile_modes.graph.folding import fold
from compile_modes.graph.sites import HARD_CODED, KEPT, Site, add_note, sites


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    probe: bool = True,
) -> nn.Module:
    """Exports both modes of an eager model into one module whose ``train()`` and ``eval()`` are exact.

    The model is exported twice (non-strict), once in each mode, and the sites of the two programs are paired. That
    tells flags that follow ``training`` from those that are written into the model or inverted, and finds random masks.
    Where the programs differ in flags only, the result is one bound GraphModule. Otherwise (auxiliary outputs,
    skipped layers, probabilities that depend on mode) it holds both programs and runs the one of its own mode; there,
    what Python decided in a submodule follows the mode of the root.

    Args:
        model: the eager module. Parameters and buffers are shared with the result, not copied. Its modes stay as they
            are, and the result starts with them, submodule by submodule.
        args, kwargs, dynamic_shapes: as for ``torch.export.export``.

    Returns:
        A module with the submodules, ``state_dict`` and modes of ``model``.

    Raises:
        ExportError: one of the exports fails (its cause is the exception's ``__cause__``), or the model's ``train()``
            changes its weights.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise ExportError(
            f"{type(model).__name__} is not an eager module",
            remedy="pass the model itself; bind() gives modes to a program that was exported already",
        )
    modes, before = flags(model), _digest(model)
    programs = {}

    def probed(vector: Vector) -> ExportedProgram:
        for name, submodule in model.named_modules():
            submodule.training = vector(name)
        with exportable(model):
            program: ExportedProgram = _export(model, vector(""), args, kwargs, dynamic_shapes)
        return program

    try:
        for training in (False, True):
            model.train(training)
            with exportable(model):
                programs[training] = _export(model, training, args, kwargs, dynamic_shapes)
        if _digest(model) != before:
            raise ExportError(
                "the state of the model changes with its mode, but its two programs share it",
                where=type(model).__name__,
                remedy="undo what its train() does to parameters and buffers (a merge of weights, say) before export",
            )
        module = assemble(programs[True], programs[False], modes, explorer=Explorer(model, probed) if probe else None)
    finally:
        model.train(modes[""])  # for models whose train() does more
        set_flags(model, modes)
    return module


def _digest(model: nn.Module) -> list[str]:
    """Tells the state of a model from another one, without a copy."""
    digests = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor) or tensor.is_complex():
            continue
        values = tensor.detach().double()
        digests.append(f"{tensor.data_ptr()} {values.sum().item()} {values.abs().sum().item()}")
    return digests


def _export(model: nn.Module, training: bool, args: Any, kwargs: Any, dynamic_shapes: Any) -> Any:
    hooks = dict(_compat.BUFFER_HOOKS)
    try:
        kwargs = dict(kwargs) if kwargs is not None else None
        return keeping_assignments(
            model, lambda: torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        )
    except ExportError:
        raise
    except Exception as error:  # whatever the model, or export on its account, raises
        for leaked in _compat.BUFFER_HOOKS.keys() - hooks.keys():
            del _compat.BUFFER_HOOKS[leaked]
        first_line = (str(error).splitlines() or [""])[0]
        raise ExportError(
            f"the {'train' if training else 'eval'} export failed: {type(error).__name__}: {first_line}",
            where=type(model).__name__,
            remedy=f"make torch.export.export(model.{'train' if training else 'eval'}(), args) work",
        ) from error


@dataclass(frozen=True)
class Explorer:
    """A model that is at hand, to be exported in more modes."""

    model: nn.Module
    probe: Probe


def assemble(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    modes: Mapping[str, bool],
    between: Mapping[int, ExportedProgram] | None = None,
    *,
    explorer: Explorer | None = None,
    together: bool = True,
    followers: Collection[str] | None = None,
) -> nn.Module:
    """The module of both modes.

    Args:
        train, evaluation: the two exports.
        modes: those it starts with, by submodule.
        between: exports with modules training down to some depth.
        explorer: makes such exports, where they are needed.
        together: False if it is known that the two programs can't be one graph.
        followers: modules that decide by their own mode, as far as known; those of all that differs if None.
    """
    roots = fresh(train), fresh(evaluation)
    found = pair(*roots)
    between, difference = dict(between or {}), found.difference
    explored: Explored | None = None
    module: nn.Module | None = None if difference else _single(roots[0], found)
    if difference and (explorer is not None or (between and together)):
        try:
            if explorer is not None:
                explored = _explored(explorer, roots)
                between, followers = explored.programs, explored.followers
            module = _switched(roots, between, explored)
        except Unmatched as why:
            together, difference = False, f"{difference}; {why}" if str(why) not in difference else difference
            roots = fresh(train), fresh(evaluation)
    if module is None:
        module = _dual(*roots, difference)
        module.follow(_owners(train, evaluation) if followers is None else followers)
    set_flags(module, modes)
    programs = {"train": train, "eval": evaluation, **{f"depth_{depth}": p for depth, p in between.items()}}
    Source(programs, together=together, followers=followers).stay_with(module)
    return module


def reassemble(
    programs: Mapping[str, ExportedProgram], modes: Mapping[str, bool], together: bool, followers: Any
) -> nn.Module:
    """:func:`assemble` from the programs of a :class:`Source`, by their names there."""
    names = [name for name in programs if name.startswith("depth_")]
    between = {int(name.removeprefix("depth_")): programs[name] for name in names}
    return assemble(programs["train"], programs["eval"], modes, between, together=together, followers=followers)


def _explored(explorer: Explorer, roots: tuple[fx.GraphModule, fx.GraphModule]) -> Explored:
    traces = trace(roots[1], depth_vector(-1)), trace(roots[0], depth_vector(math.inf))
    try:
        return explore(explorer.model, *traces, explorer.probe)
    except ExportError as error:
        raise Unmatched(f"no export in which modules are in different modes: {error.cause}") from error


def _owners(train: ExportedProgram, evaluation: ExportedProgram) -> set[str]:
    """The modules in which two programs differ, any of which may be the one that decides."""
    try:
        ops = differing(trace(fresh(evaluation), depth_vector(-1)), trace(fresh(train), depth_vector(math.inf)))
    except Unmatched:
        return set()
    return {op.owner for op in ops}


def _switched(
    roots: tuple[fx.GraphModule, fx.GraphModule], between: Mapping[int, ExportedProgram], explored: Explored | None
) -> nn.Module:
    """One bound graph with switches.

    Raises:
        Unmatched: the programs can't be one, or not one that agrees with another export.
    """
    train, evaluation = roots
    graph = OneGraph(chain(dict(between), evaluation, train))
    for vector, root in explored.checks if explored is not None else ():
        if why := graph.differs(root, vector):
            raise Unmatched(f"in other modes, {why}")
    share(train, evaluation)
    merged = graph.emit()
    by_node = {site.node: site for site in sites(train)}
    for node in merged.kept_steps:  # counts in both modes: the model's own statement
        if (step := by_node[node].step) is not None:
            add_note(step, mode=KEPT)
            by_node[node].step = None
    bindable = [by_node[node] for node in (*merged.bound, *merged.inverted, *merged.switches)]
    odd = [by_node[node] for node in merged.fixed]
    odd += [site for site in by_node.values() if site.region is not None]
    plan = _plan(bindable, odd, {by_node[node]: p for node, p in merged.inverted.items()})
    plan.counting = [by_node[node] for node in merged.counting if by_node[node].step is not None]
    carry_out(plan, train)
    return train


def _single(root: nn.Module, found: Pairing) -> nn.Module:
    """Binds the train program as the pairing says."""
    calls = [fold(region, body) for region, body in found.left_out]
    by_node = {site.node: site for site in sites(root)}
    bindable = [by_node[node] for node in (*found.bound, *found.inverted, *calls)]
    for site in by_node.values():
        if site.step in found.kept_steps:  # counts in both modes: the model's own statement
            add_note(site.step, mode=KEPT)
            site.step = None
    odd = [by_node[node] for node in found.fixed]
    odd += [site for site in by_node.values() if site.region is not None]  # a mask that eval has as well
    plan = _plan(bindable, odd, {by_node[node]: p for node, p in found.inverted.items()})
    plan.counting = [site for site in odd if site.step in found.left_out_steps]
    carry_out(plan, root)
    return root


def _plan(bindable: list[Site], odd: list[Site], inverted: Mapping[Site, float | None]) -> Plan:
    modes = {site.owner: True for site in bindable}
    supplied = {site: p for site, p in inverted.items() if p is not None}
    return Plan(True, True, modes, bindable, [], odd, set(), supplied=supplied, inverted=set(inverted))


def _dual(train: Any, evaluation: Any, difference: str) -> DualModule:
    """Binds both programs to the same flags."""
    for root, mode in ((train, True), (evaluation, False)):
        for site in sites(root):
            if site.training is (not mode):  # all flags had the program's mode, so this is no flag
                add_note(site.node, mode=HARD_CODED)
    lost = _compare_by_owner(train, evaluation)
    carry_out(plan_binding(train, ()), train)
    for root in (train, evaluation):
        hoist_constants(root)
    share(train, evaluation)
    plan = plan_binding(evaluation, (), lost)
    carry_out(plan, evaluation)
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
