"""``export``: both modes of an eager model, in one graph with flags where that is exact, in two graphs otherwise."""

import inspect
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes._compat.data import data_is_traced
from compile_modes._compat.exporting import is_taken
from compile_modes._compat.readers import mode_reads
from compile_modes.errors import ExportError, summary
from compile_modes.exported.assembling import Explorer, assemble, say_guessed
from compile_modes.exported.assigned import keeping_assignments
from compile_modes.exported.comparing import VerifyReport
from compile_modes.exported.failing import place_of
from compile_modes.exported.faithful import faithful, settled
from compile_modes.exported.provenance import flags, set_flags
from compile_modes.exported.switching.traces import Vector
from compile_modes.exported.verifying import verify_export
from compile_modes.graph.cumulative import exportable
from compile_modes.graph.dual import DualModule
from compile_modes.graph.snapshot import foreign_generators

_VECTORS = 4  # random modes in which a result is run beside the model


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    probe: bool = True,
    verify: bool | None = None,
) -> nn.Module:
    """Exports both modes of an eager model into one module whose ``train()`` and ``eval()`` are exact.

    The model is exported twice (non-strict), once in each mode, and the two programs are paired. That tells flags that
    follow ``training`` from those that are written into the model or inverted, and finds random masks. Where Python
    decides (state that only training writes, noise, a child that only training runs), each stretch that differs becomes
    a switch: two branches, and the flag of the module that decides, which a few more exports tell. Buffers that the
    model assigns are written, which torch.export forgets in submodules.

    What can't be one graph (auxiliary outputs, decisions that can't be told apart) becomes a module with both programs,
    which runs the one of its own mode; what Python decided in a submodule follows the mode of the root there, and a
    ModeWarning says so when such a submodule is put into another mode.

    Both programs keep what torch.export forgets: that the result of a dropout in eval isn't its input, and a
    ``no_grad()`` inside autocast. ``inference_mode()`` becomes ``no_grad()``: no result is an inference tensor.
    Gradients are enabled while exporting, whatever mode the call is made in.

    Args:
        model: the eager module. Parameters and buffers are shared with the result, not copied. Its modes stay as they
            are, and the result starts with them, submodule by submodule.
        args: as for ``torch.export.export``.
        kwargs: the same.
        dynamic_shapes: the same; they hold for both programs.
        probe: whether to export in more modes where Python decides. Without, the module around what differs is taken
            for the one that decides.
        verify: whether to run the result beside the model, as :func:`verify` does, which takes some calls of both. None
            does where Python decides. One graph that isn't equal in some modes becomes two programs. With
            ``probe=False``, they are run in train and eval alone.

    Returns:
        A module with the submodules, ``state_dict`` and modes of ``model``.

    Raises:
        ExportError: one of the exports fails (its cause is the exception's ``__cause__``), or has lost a change of grad
            mode; or a name in the model is one that torch's modules have taken; or the model's ``train()`` changes its
            weights, or it assigns a buffer what that can't hold.
        BindError: the same of a submodule without parameters and buffers that has a mode.
        VerifyError: the result, run beside the model, does something else.

    Warns:
        ModeWarning: with ``probe=False``, which modules were taken to decide; or the result couldn't be verified.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise messages.NOT_EAGER.error(kind=type(model).__name__)
    _check_names(model)
    modes, before = flags(model), _digest(model)
    programs: dict[bool, ExportedProgram] = {}
    readers: set[str] = set()

    def exported(training: bool) -> ExportedProgram:
        with mode_reads(model, readers):
            return _export(model, training, args, kwargs, dynamic_shapes)

    def probed(vector: Vector) -> ExportedProgram:
        for name, submodule in model.named_modules():
            submodule.training = vector(name)
        return exported(vector(""))

    try:
        for training in (False, True):
            model.train(training)
            programs[training] = exported(training)
        if _digest(model) != before:
            raise messages.STATE_CHANGES.error(kind=type(model).__name__)
        explorer = Explorer(model, probed, readers) if probe else None
        signature = inspect.signature(model.forward)
        module = assemble(programs[True], programs[False], modes, explorer=explorer, forward=signature, guess=not probe)
    finally:
        model.train(modes[""])  # for models whose train() does more
        set_flags(model, modes)
    if not probe:
        say_guessed(module)

    def differs(module: nn.Module) -> VerifyReport | None:
        report = verify_export(module, model, args, kwargs or {}, asked=verify, vectors=_VECTORS if probe else 0)
        return report if report is not None and report.first is not None else None

    report = differs(module)
    if report is not None and probe and not isinstance(module, DualModule):
        # Right with the whole model in one mode at least, with no module followed that isn't known.
        module = assemble(programs[True], programs[False], modes, forward=signature, together=False, followers=modes)
        report = differs(module)
    if report is not None and report.first is not None:
        error = messages.EXPORT_NOT_EQUAL.error(report=report, where=report.first.where)
        error.report = report
        raise error
    return module


def _check_names(model: nn.Module) -> None:
    """Raises ExportError for state at the root that no exported module can hold under its name."""
    children = {name: m for name, m in model._modules.items() if m is not None and {*m.parameters(), *m.buffers()}}
    for kind, named in (("buffer", model._buffers), ("parameter", model._parameters), ("submodule", children)):
        for name in named:
            if is_taken(name):
                raise messages.NAME_OF_TORCH.error(kind=kind, name=name)


def _digest(model: nn.Module) -> list[str]:
    """Tells the state of a model from another one, without a copy."""
    digests = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor) or tensor.is_complex():
            continue
        values = tensor.detach().double()
        digests.append(f"{tensor.data_ptr()} {values.sum().item()} {values.abs().sum().item()}")
    return digests


def _not_assigned(why: str) -> ExportError:
    return messages.ASSIGNED.error(why=why, where="an assignment to .data")


def _export(model: nn.Module, training: bool, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """The program of the modes that a model is in; ``training`` is the root's."""
    hooks = dict(_compat.BUFFER_HOOKS)
    before = {name: (set_state, state) for name, set_state, state in foreign_generators()}
    try:
        kwargs = dict(kwargs) if kwargs is not None else None
        with exportable(model), faithful(), data_is_traced(_not_assigned):
            program = keeping_assignments(
                model, lambda: torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            )
    except ExportError:
        raise
    except Exception as error:  # whatever the model, or export on its account, raises
        for leaked in _compat.BUFFER_HOOKS.keys() - hooks.keys():
            del _compat.BUFFER_HOOKS[leaked]
        mode = "train" if training else "eval"
        raise messages.EXPORT_FAILED.error(mode=mode, error=summary(error), where=place_of(error, model)) from error
    after = {name: state for name, _, state in foreign_generators()}
    drawn = [name for name, (_, state) in before.items() if pickle.dumps(state) != pickle.dumps(after[name])]
    for name in drawn:
        set_state, state = before[name]
        set_state(state)
    if drawn:
        mode = "train" if training else "eval"
        raise messages.DRAWN_IN_PYTHON.error(mode=mode, generators=" and ".join(drawn), kind=type(model).__name__)
    return settled(program)
