"""``export``: both modes of an eager model, in one graph with flags where that is exact, in two graphs otherwise."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes._compat.exporting import is_taken
from compile_modes.errors import few
from compile_modes.exported.assembling import assemble, say_guessed
from compile_modes.exported.comparing import VerifyReport
from compile_modes.exported.exporter import Exporter
from compile_modes.exported.provenance import Source
from compile_modes.exported.verifying import verify_export

_VECTORS = 8  # random modes in which a result is run beside the model


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    probe: bool = True,
    verify: bool | None = None,
    progress: bool = True,
) -> nn.Module:
    """Exports both modes of an eager model into one module whose ``train()`` and ``eval()`` are exact.

    The model is exported twice (non-strict), once in each mode, and the two programs are paired. That tells flags that
    follow ``training`` from those that are written into the model or inverted, and finds random masks. Where Python
    decides (state that only training writes, noise, a child that only training runs), each stretch that differs becomes
    a switch: two branches, and the flag of the module that decides, which a few more exports tell. Buffers that the
    model assigns are written, which torch.export forgets in submodules.

    What can't be one graph (auxiliary outputs, decisions that can't be told apart) becomes a module with both programs,
    which runs the one of its own mode. Each has switches for what its submodules decide, where that can be told; where
    it can't, it follows the mode of the root, and a ModeWarning says so when such a submodule is put into another mode.

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
            does where Python decides; what ``forward`` keeps in Python (a list, a count) is moved on by these calls, as
            by any. One graph that isn't equal in some modes becomes two programs. With
            ``probe=False``, they are run in train and eval alone.
        progress: whether to show on a terminal how many exports it has taken so far; with rich only.

    Returns:
        A module with the submodules, ``state_dict`` and modes of ``model``.

    Raises:
        ExportError: one of the exports fails (its cause is the exception's ``__cause__``), or has lost a change of grad
            mode; or a name in the model is one that torch's modules have taken; or the model's ``train()`` changes its
            weights, it assigns a buffer what that can't hold, draws random numbers that are not torch's, or runs an
            ``autograd.Function``, whose backward is lost.
        BindError: the same of a submodule without parameters and buffers that has a mode.
        VerifyError: the result, run beside the model, does something else.

    Warns:
        ModeWarning: with ``probe=False``, which modules were taken to decide; or the result couldn't be verified; or
            which submodules have one mode, whatever their flag, for the model's ``train()`` leaves them in it.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise messages.NOT_EAGER.error(kind=type(model).__name__)
    _check_state(model)
    signature = inspect.signature(model.forward)
    with Exporter(model, args, kwargs, dynamic_shapes, progress=progress) as exporter:
        train, evaluation = exporter.both()
        modes, prober = exporter.modes, exporter if probe else None
        module = assemble(train, evaluation, modes, exporter=prober, forward=signature, guess=not probe)
    if not probe:
        say_guessed(module)
    if exporter.kept:
        messages.KEPT_BY_TRAIN.warn(kind=type(model).__name__, modules=few(map(repr, sorted(exporter.kept))))

    def compare(module: nn.Module) -> VerifyReport | None:
        vectors = _VECTORS if probe else 0
        return verify_export(module, model, args, kwargs or {}, asked=verify, vectors=vectors, kept=exporter.kept)

    report = compare(module)
    source = Source.of(module)
    assert source is not None
    if probe and report is not None and report.first is not None and source.switches:
        # Right with the whole model in one mode, maybe: then no submodule is followed of which it isn't known.
        module = assemble(train, evaluation, modes, forward=signature, together=False, followers=modes)
        report = compare(module)
    if report is not None and report.first is not None:
        error = messages.EXPORT_NOT_EQUAL.error(report=report, where=report.first.where)
        error.report = report
        raise error
    return module


def _check_state(model: nn.Module) -> None:
    """Raises ExportError for state that no exported module can hold: names of torch's, or made for inference."""
    children = {name: m for name, m in model._modules.items() if m is not None and {*m.parameters(), *m.buffers()}}
    for kind, named in (("buffer", model._buffers), ("parameter", model._parameters), ("submodule", children)):
        for name in named:
            if is_taken(name):
                raise messages.NAME_OF_TORCH.error(kind=kind, name=name)
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise messages.LOST_CALL.error(what=f"hooks on the gradients of {name or type(model).__name__!r}")
    if frozen := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
        raise messages.INFERENCE_PARAMETERS.error(names=few(map(repr, frozen)), kind=type(model).__name__)
