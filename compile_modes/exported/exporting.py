"""``export``: both modes of an eager model, in one graph with flags where that is exact, in two graphs otherwise."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes.errors import ExportError
from compile_modes.exported.arguments import take_names
from compile_modes.exported.assigned import keeping_assignments
from compile_modes.exported.binding import carry_out
from compile_modes.exported.faithful import faithful, settled
from compile_modes.exported.pairing import Pairing, pair
from compile_modes.exported.planning import Plan, plan_binding
from compile_modes.exported.provenance import Source, flags, set_flags
from compile_modes.graph.cumulative import exportable
from compile_modes.graph.dual import DualModule, share
from compile_modes.graph.edits import hoist_constants, own
from compile_modes.graph.finding import find, sites
from compile_modes.graph.folding import fold
from compile_modes.graph.sites import HARD_CODED, KEPT, Site, add_note
from compile_modes.graph.view import View


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None
) -> nn.Module:
    """Exports both modes of an eager model into one module whose ``train()`` and ``eval()`` are exact.

    The model is exported twice (non-strict), once in each mode, and the sites of the two programs are paired. That
    tells flags that follow ``training`` from those that are written into the model or inverted, and finds random masks.
    Where the programs differ in flags only, the result is one bound GraphModule. Otherwise (auxiliary outputs,
    skipped layers, probabilities that depend on mode) it holds both programs and runs the one of its own mode; there,
    what Python decided in a submodule follows the mode of the root.

    Both programs keep what torch.export forgets: that the result of a dropout in eval isn't its input, and a
    ``no_grad()`` inside autocast. ``inference_mode()`` becomes ``no_grad()``: no result is an inference tensor.
    Gradients are enabled while exporting, whatever mode the call is made in.

    Args:
        model: the eager module. Parameters and buffers are shared with the result, not copied. Its modes stay as they
            are, and the result starts with them, submodule by submodule.
        args: as for ``torch.export.export``.
        kwargs: the same.
        dynamic_shapes: the same; they hold for both programs.

    Returns:
        A module with the submodules, ``state_dict`` and modes of ``model``.

    Raises:
        ExportError: one of the exports fails (its cause is the exception's ``__cause__``), or has lost a change of grad
            mode; or the model's ``train()`` changes its weights.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise messages.NOT_EAGER.error(kind=type(model).__name__)
    modes, before = flags(model), _digest(model)
    programs = {}
    try:
        for training in (False, True):
            model.train(training)
            with exportable(model):
                programs[training] = _export(model, training, args, kwargs, dynamic_shapes)
        if _digest(model) != before:
            raise messages.STATE_CHANGES.error(kind=type(model).__name__)
    finally:
        model.train(modes[""])  # for models whose train() does more
        set_flags(model, modes)
    return assemble(programs[True], programs[False], modes, inspect.signature(model.forward))


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
        with faithful():
            program = keeping_assignments(
                model, lambda: torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            )
    except ExportError:
        raise
    except Exception as error:  # whatever the model, or export on its account, raises
        for leaked in _compat.BUFFER_HOOKS.keys() - hooks.keys():
            del _compat.BUFFER_HOOKS[leaked]
        first_line = (str(error).splitlines() or [""])[0]
        said, mode = f"{type(error).__name__}: {first_line}", "train" if training else "eval"
        raise messages.EXPORT_FAILED.error(mode=mode, error=said, kind=type(model).__name__) from error
    return settled(program)


def assemble(
    train: ExportedProgram,
    evaluation: ExportedProgram,
    modes: Mapping[str, bool],
    forward: inspect.Signature | None = None,
) -> nn.Module:
    """The module of both modes, from its two exports.

    Args:
        train, evaluation: the exports.
        modes: those it starts with, by submodule.
        forward: the signature of the model, if it is at hand.
    """
    roots = train.module(), evaluation.module()
    for root in roots:
        own(root)
    found = pair(*roots)
    for root in roots:
        take_names(root, forward)
    module = _dual(*roots, found.difference) if found.difference else _single(roots[0], found)
    set_flags(module, modes)
    Source({"train": train, "eval": evaluation}).stay_with(module)
    return module


def _single(root: nn.Module, found: Pairing) -> nn.Module:
    """Binds the train program as the pairing says."""
    calls = [fold(region, body) for region, body in found.left_out]
    view = View(root)
    by_node = {site.node: site for site in find(view)}
    bindable = [by_node[node] for node in (*found.bound, *found.inverted, *calls)]
    for site in by_node.values():
        if site.step in found.kept_steps:  # counts in both modes: the model's own statement
            add_note(site.step, mode=KEPT)
            site.step = None
    odd = [by_node[node] for node in found.fixed]
    odd += [site for site in by_node.values() if site.region is not None]  # a mask that eval has as well
    plan = _plan(view, bindable, odd, {by_node[node]: p for node, p in found.inverted.items()})
    plan.counting = [site for site in odd if site.step in found.left_out_steps]
    carry_out(plan)
    return root


def _plan(view: View, bindable: list[Site], odd: list[Site], inverted: Mapping[Site, float | None]) -> Plan:
    modes = {site.owner: True for site in bindable}
    supplied = {site: p for site, p in inverted.items() if p is not None}
    return Plan(view, True, True, modes, bindable, [], odd, set(), supplied=supplied, inverted=set(inverted))


def _dual(train: Any, evaluation: Any, difference: str) -> DualModule:
    """Binds both programs to the same flags."""
    for root, mode in ((train, True), (evaluation, False)):
        for site in sites(root):
            if site.training is (not mode):  # all flags had the program's mode, so this is no flag
                add_note(site.node, mode=HARD_CODED)
    lost = _compare_by_owner(train, evaluation)
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
