"""From a Dynamo graph to the ATen graph that AOTAutograd would differentiate, before it does."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from compile_modes import _compat, messages
from compile_modes._compat import FakeTensor, frames, kept, tracing
from compile_modes._compat.kept import Treatment
from compile_modes.errors import summary
from compile_modes.graph.finding import sites
from compile_modes.graph.functional import HIDDEN

_log = logging.getLogger(__name__)
_RETURNS_INPUT = frozenset(
    {
        nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
        nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout,
        torch.alpha_dropout, torch.feature_alpha_dropout,
    }
)  # fmt: skip


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
        raise messages.NOT_RETRACED.error(error=summary(error), node=_failing_node(error)) from error
    captured.recompile()
    return captured


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
        traced = tracing.trace(Retracer(gm, held, notes).run, inputs, values)
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
        found = sites(tracing.trace(run, list(operands.values()), list(operands.values())))
    except _compat.CONTROL_FLOW:
        raise
    except Exception as error:
        _log.info("what %s calls is not known: %s: %s", call.target, type(error).__name__, error)
        return frozenset({None})
    return frozenset(site.training for site in found if not site.modeless)


def _failing_node(error: Exception) -> str:
    """The node that the interpreter was at; it says so at the end of the exception's text."""
    return next((line for line in str(error).splitlines() if line.startswith("While executing ")), "")


def transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes in functorch transforms (vmap, grad, jvp), which are copied together, as they came.

    Each stretch reaches from what opens a transform to what closes it, and on to the last use of a value that only
    functorch understands: the second transform of jacrev takes tensors of the first.

    Raises:
        ValueError: a transform is not closed in this graph.
    """
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    found: set[fx.Node] = set()
    depth, last = 0, -1
    for index, node in enumerate(nodes):
        opened = kept.nesting(node.target) if node.op == "call_function" else 0
        depth += opened
        if depth or opened or index <= last:
            found.add(node)
            if any(map(kept.is_wrapped, pytree.tree_leaves(node.meta.get("example_value")))):
                last = max([last, *(order[user] for user in node.users)])
        if node.op == "output" and node in found:
            raise ValueError("a functorch transform is still open at the end of the graph")
    return found


def visit_calls(graph: fx.Graph, visit: Callable[[fx.Node], None]) -> None:
    """Visits the calls that a retrace copies, but for those in transforms, each in the surroundings of its body."""
    outside = transformed(graph)
    with kept.Surroundings() as surroundings:
        for node in graph.nodes:
            if node.op != "call_function" or node in outside:
                continue
            surroundings.switch(node)
            if kept.treatment(node.target) is Treatment.COPY:
                with kept.surroundings_of_body(node):
                    visit(node)


class Retracer(fx.Interpreter):
    """Runs a Dynamo graph, to be traced, and compares with what Dynamo saw.

    What must not be run is copied instead: its results are the fake tensors that Dynamo left.

    Args:
        gm: the graph.
        bodies: what takes the place of graphs that calls of this graph run, by the name of the attribute.
        notes: what to add to the meta of copied nodes.
    """

    def __init__(
        self, gm: fx.GraphModule, bodies: Mapping[str, fx.GraphModule], notes: Mapping[fx.Node, dict[str, Any]]
    ) -> None:
        super().__init__(gm)
        self._bodies, self._notes = bodies, notes
        self._transformed = transformed(gm.graph)
        self._copies: dict[fx.Node, fx.Node] = {}
        self._surroundings = kept.Surroundings()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph; under ``make_fx``, its new graph gets what is not run."""
        self._recorder = tracing.Recorder()
        with self._surroundings:
            return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """One node: run and compared, or copied."""
        if n.op == "output":
            for node in n.all_input_nodes:
                self._compare(node, self.env[node], "requires_grad")
        if n.op == "call_module":
            raise ValueError(f"the module {n.target} would not survive")
        how = kept.treatment(n.target) if n.op == "call_function" else Treatment.RUN
        if how is Treatment.COPY and isinstance(n.target, OpOverload):
            raise ValueError(f"{n.target} would not survive")  # set_: what it does to its operand, later nodes see
        if n in self._transformed or how is not Treatment.RUN:
            return self._copy(n, how)
        given = next(iter(n.all_input_nodes), None) if n.target in _RETURNS_INPUT else None
        result = super().run_node(n) if given is None or len(given.users) == 1 else self._run_on_alias(n, given)
        self._compare(n, result, "dtype")
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As the base, but running the graph would write to a tensor that is not fake."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            raise ValueError(f"the real tensor {target} would not survive")
        return value

    def _copy(self, n: fx.Node, how: Treatment) -> Any:
        copied = self._copies[n] = self._recorder.copy(n, self._operand)
        copied.meta.update(self._notes.get(n, {}))
        if how is Treatment.SWITCH:
            self._surroundings.switch(n)
        value = n.meta.get("example_value")
        inside = n in self._transformed and all(user in self._transformed for user in n.users)
        if inside or any(map(kept.is_wrapped, pytree.tree_leaves(value))):
            return None  # only nodes that are copied too use it
        return self._recorder.result(copied, value)

    def _operand(self, node: fx.Node) -> Any:
        """What stands for a node of the old graph in the new one."""
        if node not in self._copies and node.op == "get_attr":
            held: Any = self.env[node]
            if isinstance(held, torch.Tensor):
                return self._recorder.operand(held)
            held = self._bodies.get(str(node.target), held)
            self._copies[node] = self._recorder.attribute(node, held)
        return self._copies[node] if node in self._copies else self._recorder.operand(self.env[node])

    def _run_on_alias(self, n: fx.Node, given: fx.Node) -> Any:
        """Runs a dropout on an alias of its input, which is used elsewhere too.

        In eval it returns the tensor that it is given, and the tracer, which knows values by identity, would take later
        uses of the input for uses of the result: wrong as soon as the dropout is put into train. In a block without
        gradients, too, what eval returns has the gradient of the input.
        """
        value = self.env[given]
        cut = value.requires_grad and not torch.is_grad_enabled()
        with torch.enable_grad() if cut else contextlib.nullcontext():
            self.env[given] = torch.ops.aten.alias.default(value)
        result = super().run_node(n)
        self.env[given] = value
        return result

    def _compare(self, node: fx.Node, now: Any, what: str) -> None:
        before = node.meta.get("example_value")
        both = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
        if both and getattr(now, what) != getattr(before, what):
            raise ValueError(f"{node} has {what} {getattr(now, what)} now, {getattr(before, what)} before")
