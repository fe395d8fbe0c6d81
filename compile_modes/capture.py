"""From a Dynamo graph to the ATen graph that AOTAutograd would differentiate, before it does."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from compile_modes import _compat
from compile_modes.errors import CaptureError

_REMEDY = "without overrides the graph compiles as stock Inductor compiles it"


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Retraces a Dynamo graph to training IR: ATen ops, composite ones whole, autograd not yet derived.

    Inputs keep their order, names, meta and Dynamo sources, without which Inductor would not know parameters from
    activations. Node meta (stack traces, ``nn_module_stack``, ``custom``) is carried over.

    Args:
        gm: what Dynamo hands to a backend; left as it is.
        example_inputs: what Dynamo hands over beside it.

    Returns:
        A new GraphModule with the same inputs and outputs.

    Raises:
        CaptureError: the graph can't be traced again, with the tracer's exception as ``__cause__``.
    """
    if call := _compat.not_retraceable(gm):
        raise CaptureError(f"the graph could not be retraced before autograd: {call} would not survive", remedy=_REMEDY)
    try:
        captured = _compat.trace_pre_dispatch(gm, _compat.fake_inputs(gm, example_inputs))
        _compat.carry_placeholders(gm.graph, captured.graph)
    except _compat.CONTROL_FLOW:
        raise
    except Exception as error:  # whatever the ops of the user's model raise on being traced again
        first_line = (str(error).splitlines() or [""])[0]
        raise CaptureError(
            f"the graph could not be retraced before autograd: {type(error).__name__}: {first_line}",
            where=_failing_node(error),
            remedy=_REMEDY,
        ) from error
    captured.recompile()
    return captured


def _failing_node(error: Exception) -> str:
    """The node that the interpreter was at; it says so at the end of the exception's text."""
    return next((line for line in str(error).splitlines() if line.startswith("While executing ")), "")
