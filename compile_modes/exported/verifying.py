"""``verify``: whether a module does what its eager model does, in all modes of every submodule."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compile_modes import _compat, messages
from compile_modes._compat.cache import is_compiled
from compile_modes.errors import VerifyError
from compile_modes.exported.beside import compared
from compile_modes.exported.comparing import Tolerance, VerifyReport
from compile_modes.exported.provenance import Source
from compile_modes.graph import calls
from compile_modes.graph.cumulative import is_cumulative
from compile_modes.graph.dual import DualModule
from compile_modes.graph.view import View


def verify(
    ours: nn.Module,
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    vectors: int = 8,
    steps: int = 2,
    atol: float | None = None,
    raise_error: bool = True,
) -> VerifyReport:
    """Runs a module beside its eager model in many combinations of modes, and compares all that the calls leave.

    Both are called in train, in eval, and in random modes of every submodule that both have, several times in each,
    from the same state and with the same seeds. Compared are the outputs and their structure; what a backward pass
    gives for parameters and for inputs that require grad, or that nothing arrives there; every parameter and buffer;
    tensors among the arguments; and the states of torch's generators. The model is put into the root's mode by its
    ``train()``, and each submodule into its own by its flag, not by a ``train()`` of its own. Mode vectors of which a
    ModeWarning says that the module doesn't follow them, and random ones in which the model itself fails, are left out,
    and listed.

    Afterwards everything is as before, also if a call raises: parameters, buffers, flags, ``.grad``, the arguments, and
    the generators of torch (CPU and CUDA), Python and NumPy. Not restored: Python state and tensors that ``forward``
    keeps elsewhere. Where module and model share their state, each runs from a copy of it in turn.

    Compiled modules are compiled in each mode vector, which stays so and counts against Dynamo's limits. Inductor draws
    other random numbers than eager, unless ``torch._inductor.config.fallback_random`` is set: calls that draw some end
    the comparison of their vector then, and are listed as left out.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    >>> print(verify(export(model, (torch.ones(2, 4),)), model, torch.ones(2, 4)))
    equal: ...

    Args:
        ours: what was made from the model: bound, exported, loaded, compiled.
        model: the eager module.
        args: what both are called with.
        kwargs: keyword arguments of the call.
        vectors: how many random mode vectors, beside train and eval.
        steps: how many calls in each vector, from one state to the next.
        atol: the largest difference of floating-point values that counts as equal. None is no difference at all, except
            where a module is compiled or has a batch norm with ``momentum=None``: then 1e-7 for float64, 1e-4 for
            float32 and 2e-2 for smaller ones, relative to the largest value of a tensor, but at least to 1. Kernels
            that sum in random order, as some do on CUDA, need one.
        raise_error: whether to raise, or only to report, a difference.

    Returns:
        The report; its text says what was compared, how large the differences are and where the first one is.

    Raises:
        VerifyError: they differ, with the report as ``.report``; or, always, they can't be compared: parameters have
            other names, the model can't be called with these arguments, the module has no modes.
        OptionError: ``vectors`` or ``steps`` is no count.
    """
    model = getattr(model, "_orig_mod", model)
    loose = any(is_compiled(m) for m in ours.modules()) or any(map(is_cumulative, model.modules()))
    tolerance = Tolerance(atol, dtypes=loose)
    report = compared(ours, model, args, kwargs or {}, vectors=vectors, steps=steps, tolerance=tolerance)
    if raise_error and report.first is not None:
        kind = type(getattr(ours, "_orig_mod", ours)).__name__
        error = messages.NOT_EQUAL.error(kind=kind, report=report, where=report.first.where)
        error.report = report
        raise error
    return report


def verify_export(
    module: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    asked: bool | None,
    vectors: int,
    kept: Mapping[str, bool],
) -> VerifyReport | None:
    """Runs what ``export`` has made beside the model, if asked to, or if not asked and Python decides in it.

    Differences within the tolerance of compiled code are none here: eager chooses kernels that a program doesn't have,
    for attention in eval say. Modules in ``kept`` stay in that mode.

    Returns:
        The report, or None if they weren't run.

    Raises:
        VerifyError: it was asked for and the two can't be compared.

    Warns:
        ModeWarning: they can't be compared.
    """
    if asked is False or (asked is None and not _python_decides(module)):
        return None
    tensors = (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))
    unreal = any(isinstance(t, _compat.FakeTensor) or (isinstance(t, Tensor) and t.is_meta) for t in tensors)
    if asked is None and unreal:
        return None
    try:
        tolerance = Tolerance(None, dtypes=True)
        return compared(module, model, args, kwargs, vectors=vectors, steps=2, tolerance=tolerance, kept=kept)
    except VerifyError as error:
        if asked:
            raise
        messages.NOT_VERIFIED.warn(error=error.headline)
        return None


def _python_decides(module: nn.Module) -> bool:
    """Whether the two programs of an export differ in more than flags."""
    source = Source.of(module)
    assert source is not None
    return isinstance(module, DualModule) or source.explored or any(map(_is_switch, View(module).nodes()))


def _is_switch(node: fx.Node) -> bool:
    return node.target is calls.switch
