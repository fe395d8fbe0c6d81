"""From a Dynamo graph to the ATen graph that AOTAutograd would differentiate, before it does."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from compile_modes import _compat
from compile_modes._compat import frames
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
        captured = _retrace(gm, frames.fake_inputs(gm, example_inputs))
        frames.carry_placeholders(gm.graph, captured.graph)
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
    """Runs a Dynamo graph on Dynamo's own fake tensors, and traces that."""
    values = [*inputs, *(node.meta.get("example_value") for node in gm.graph.nodes)]
    grad_mode = torch.is_grad_enabled()
    try:
        with fx.traceback.preserve_node_meta():
            return _trace(_Checked(gm).run, inputs, values)
    finally:
        torch.set_grad_enabled(grad_mode)  # a graph may end in another mode than it began in


def _trace(function: Callable[..., Any], inputs: Sequence[Any], values: Sequence[Any]) -> fx.GraphModule:
    """AOTAutograd's tracer; ``pre_dispatch`` keeps composite ops such as ``batch_norm`` and ``dropout`` whole."""
    # Not tracing_mode="fake": it makes new fakes in the mode that Dynamo keeps for the backend, which know nothing of
    # the item() of a scalar input.
    modes = [value.fake_mode for value in values if isinstance(value, _compat.FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext():
        return make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)


_RETURNS_INPUT = frozenset(
    {
        nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
        nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout,
        torch.alpha_dropout, torch.feature_alpha_dropout,
    }
)  # fmt: skip


class _Checked(fx.Interpreter):
    """Runs a Dynamo graph again and compares with what Dynamo saw.

    Autocast, for one, is recorded but not applied while tracing before dispatch: whatever looks at dtypes then goes
    another way, and ``y.float()`` of what should be bfloat16 becomes ``y`` itself.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            for node in n.all_input_nodes:
                self._compare(node, self.env[node], "requires_grad")
        given = next(iter(n.all_input_nodes), None) if n.target in _RETURNS_INPUT else None
        result = super().run_node(n) if given is None or len(given.users) == 1 else self._run_on_alias(n, given)
        self._compare(n, result, "dtype")
        return result

    def _run_on_alias(self, n: fx.Node, given: fx.Node) -> Any:
        """Runs a dropout on an alias of its input, which is used elsewhere too.

        In eval it returns the tensor that it is given, and the tracer, which knows values by identity, would take later
        uses of the input for uses of the result: wrong as soon as the dropout is put into train.
        """
        value = self.env[given]
        self.env[given] = torch.ops.aten.alias.default(value)
        result = super().run_node(n)
        self.env[given] = value
        return result

    def _compare(self, node: fx.Node, now: Any, what: str) -> None:
        before = node.meta.get("example_value")
        both = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
        if both and getattr(now, what) != getattr(before, what):
            raise ValueError(f"{node} has {what} {getattr(now, what)} now, {getattr(before, what)} before")


def _failing_node(error: Exception) -> str:
    """The node that the interpreter was at; it says so at the end of the exception's text."""
    return next((line for line in str(error).splitlines() if line.startswith("While executing ")), "")
