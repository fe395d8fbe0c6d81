"""From a Dynamo graph to the ATen graph that AOTAutograd would differentiate, before it does."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from compile_modes import _compat
from compile_modes._compat import frames, kept
from compile_modes.calls import HIDDEN
from compile_modes.errors import CaptureError
from compile_modes.retrace import Retracer, visit_calls
from compile_modes.sites import sites

_log = logging.getLogger(__name__)
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
    try:
        captured = _retrace(gm, frames.fake_inputs(gm, example_inputs))
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


def trace_in_place_of(node: fx.Node, function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a function to ATen before autograd, on fake tensors; each new node takes over the meta of ``node``."""
    with fx.traceback.preserve_node_meta(), fx.traceback.set_current_meta(node):
        return _trace(function, inputs, inputs)


def _retrace(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a Dynamo graph, and first the graphs that its calls run, on Dynamo's own fake tensors."""
    held: dict[str, fx.GraphModule] = {}
    notes: dict[fx.Node, dict[str, Any]] = {}

    def visit(call: fx.Node) -> None:
        if kept.is_opaque_function(call.target):
            notes[call] = {HIDDEN: _hidden_modes(gm, call)}
        elif kept.runs_bodies(call.target):
            for name in (str(node.target) for node in call.all_input_nodes if node.op == "get_attr"):
                body = getattr(gm, name)
                if name not in held and isinstance(body, fx.GraphModule):
                    held[name] = _retraced_body(body)

    visit_calls(gm.graph, visit)
    values = [*inputs, *(node.meta.get("example_value") for node in gm.graph.nodes)]
    with fx.traceback.preserve_node_meta():
        traced = _trace(Retracer(gm, held, notes).run, inputs, values)
    frames.carry_placeholders(gm.graph, traced.graph)
    return traced


def _retraced_body(body: fx.GraphModule) -> fx.GraphModule:
    """The graph that a call runs, traced, or, if it can't be, as it came."""
    inputs = body.graph.find_nodes(op="placeholder")
    try:
        traced = _retrace(body, [node.meta["example_value"] for node in inputs])
        frames.carry_results(body.graph, traced.graph)
    except _compat.CONTROL_FLOW:
        raise
    except Exception as error:
        _log.info("the graph of a call is kept as it came: %s: %s", type(error).__name__, error)
        return body
    traced.meta = dict(body.meta)
    traced.recompile()
    return traced


def _hidden_modes(gm: fx.GraphModule, call: fx.Node) -> frozenset[bool | None]:
    """The modes of the sites in a function that the graph does not show, None among them if that can't be found out."""
    held = {node: getattr(gm, str(node.target)) for node in call.all_input_nodes if node.op == "get_attr"}
    operands = {node: node.meta.get("example_value") for node in call.all_input_nodes if node not in held}

    def run(*values: Any) -> Any:
        given = held | dict(zip(operands, values, strict=True))
        return call.target(*fx.map_arg(call.args, given.get), **fx.map_arg(call.kwargs, given.get))  # type: ignore[operator]

    try:
        found = sites(_trace(run, list(operands.values()), list(operands.values())))
    except _compat.CONTROL_FLOW:
        raise
    except Exception as error:
        _log.info("what %s calls is not known: %s: %s", call.target, type(error).__name__, error)
        return frozenset({None})
    return frozenset(site.training for site in found if not site.modeless)


def _trace(function: Callable[..., Any], inputs: Sequence[Any], values: Sequence[Any]) -> fx.GraphModule:
    """AOTAutograd's tracer; ``pre_dispatch`` keeps composite ops such as ``batch_norm`` and ``dropout`` whole."""
    # Not tracing_mode="fake": it makes new fakes in the mode that Dynamo keeps for the backend, which know nothing of
    # the item() of a scalar input.
    modes = [value.fake_mode for value in values if isinstance(value, _compat.FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext():
        return make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)


def _failing_node(error: Exception) -> str:
    """The node that the interpreter was at; it says so at the end of the exception's text."""
    return next((line for line in str(error).splitlines() if line.startswith("While executing ")), "")
