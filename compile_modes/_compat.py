"""Every private torch name and every version branch of this package, in one place.

Checked on torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0. When torch moves one of these, this file is the one to change.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import Source
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

# Base of BatchNorm1d to 3d, SyncBatchNorm and the lazy ones: the modules whose forward advances num_batches_tracked.
BATCH_NORM = nn.modules.batchnorm._BatchNorm

# Base of Dropout, Dropout1d to 3d, AlphaDropout and FeatureAlphaDropout.
DROPOUT = nn.modules.dropout._DropoutNd

# Raised through backends on purpose: Dynamo answers them by another attempt or by leaving the frame alone.
CONTROL_FLOW = (RestartAnalysis, SkipFrame)

# The submodule by which ep.module() checks its inputs.
GUARDS = "_guards_fn"

# Higher-order ops that run their one body exactly once: a statement inside the body may as well stand before the call.
UNCONDITIONAL_HOPS: tuple[HigherOrderOperator, ...] = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)

# Higher-order ops that come out of a retrace as they went in. The others carry autograd or compilation state that
# running their implementation loses, silently for some (autograd_function_apply, invoke_subgraph, hooks).
RETRACEABLE_HOPS = (
    *UNCONDITIONAL_HOPS,
    torch.ops.higher_order.cond,
    torch.ops.higher_order.scan,
    torch.ops.higher_order.while_loop,
)

# Home of functions that act on the state of autograd and functorch: .data, inference_mode, vmap, grad, jvp.
_STATEFUL_MODULES = ("torch.autograd", "torch._C._autograd", "torch._functorch", "torch._C._functorch")

# Home of the Python functions that only compute. Any other (a user's allow_in_graph function, sdpa_kernel) may carry
# autograd or change global state inside, of which a retrace records nothing.
_PURE_MODULES = ("torch.nn.functional", "torch.functional", "torch._jit_internal", "torch._tensor", "torch.fx",
                 "torch.amp.autocast_mode", "torch._dynamo", "torch.linalg", "torch.fft", "torch.special", "math",
                 "operator", "_operator", "builtins")  # fmt: skip


def not_retraceable(gm: fx.GraphModule) -> str:
    """What in a Dynamo graph, or in a graph below it, a retrace does not preserve; ``""`` if all is well."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            return f"the module {type(module).__name__}"  # real parameters; Dynamo inlines modules by default
        for node in module.graph.nodes:
            if node.op == "call_function" and not _pure(node.target):
                return str(getattr(node.target, "__name__", node.target))
            if node.op == "get_attr":
                held = getattr(module, str(node.target), None)
                if isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor):
                    return f"the real tensor {node.target}"  # running the graph would write to it
    return ""


def _pure(target: Any) -> bool:
    """Whether a call only computes; grad mode and autocast regions count as computing, for a retrace records them."""
    if isinstance(target, HigherOrderOperator):
        return target in RETRACEABLE_HOPS
    name, home = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if _below(home, _STATEFUL_MODULES) or (name.startswith(("set_", "_set_")) and name != "_set_grad_enabled"):
        return False
    return not isinstance(target, types.FunctionType) or home == "torch" or _below(home, _PURE_MODULES)


def _below(home: str, modules: Sequence[str]) -> bool:
    return any(home == module or home.startswith(module + ".") for module in modules)


def aten_overload(name: str) -> OpOverload | None:
    """The overload ``aten::<name>`` (``stem`` or ``stem.overload``), or None if this torch has none."""
    stem, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, stem, None)
    found = getattr(packet, overload or "default", None)
    return found if isinstance(found, OpOverload) else None


def refresh(module: nn.Module) -> None:
    """Makes an edited graph take effect, also where Dynamo has compiled a parent of ``module`` before.

    Dynamo guards on the class of a child module, not on its ``forward``'s code, so a mere ``recompile()`` goes
    unnoticed inside a compiled parent. A GraphModule has a class of its own per instance; a new one trips the guard.
    """
    if isinstance(module, fx.GraphModule):
        old = type(module)
        generated = ("forward", "__call__", "_wrapped_call", "__dict__", "__weakref__")
        kept = {name: value for name, value in vars(old).items() if name not in generated}
        module.__class__ = type(old.__name__, old.__bases__, {**kept, "__qualname__": old.__qualname__})
        module.recompile()
    else:  # UnflattenedModule and InterpreterModule keep a GraphModule beside their graph
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
            module.finalize()  # type: ignore[operator]


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo read a graph input from, e.g. ``L['self']._modules['bn']._buffers['running_mean']``; or ``""``."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def frame_modules() -> list[nn.Module]:
    """The modules among the local variables of the frame that Dynamo is compiling; none outside Dynamo."""
    scope = _frame_scope()
    return [value for value in scope["L"].values() if isinstance(value, nn.Module)] if scope else []


def pin_owner(placeholder: fx.Node) -> nn.Module | None:
    """The live module that owns the buffer which Dynamo made a graph input, pinned by a guard on its identity.

    Dynamo shares one compiled graph between instances of a class. Whoever wants to use this very instance needs the
    guard, which the compilation in progress gets here. None if the input is not a buffer of a module.
    """
    scope, source = _frame_scope(), getattr(placeholder, "_dynamo_source", None)
    owner = getattr(getattr(source, "base", None), "base", None)  # module ._buffers ['running_mean']
    if scope is None or not isinstance(owner, Source):
        return None
    name: Any = owner.name
    module = eval(name() if callable(name) else name, scope)  # an expression that Dynamo generated for its guards
    if not isinstance(module, nn.Module):
        return None
    install_guard(owner.make_guard(GuardBuilder.ID_MATCH))
    return module


def _frame_scope() -> dict[str, Any] | None:
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # no translation is in progress
        return None
    return {"L": output.local_scope, "G": output.global_scope}


def graphs_compiled() -> int:
    """How many graphs Dynamo has handed to backends in this process, or since its counters were cleared."""
    return int(counters["stats"]["unique_graphs"])


def is_whole_frame(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph holds all of a function's ops: no graph break ended it, and it resumes no other."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    try:
        code = InstructionTranslator.current_tx().f_code.co_name
    except AttributeError:
        code = ""
    return not getattr(reason, "graph_break", False) and not code.startswith("torch_dynamo_resume_in_")


def fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The fake tensors and symbolic integers that Dynamo traced a graph with, one per input."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise ValueError(f"the graph has {len(placeholders)} inputs, {len(example_inputs)} were given")
    inputs = [p.meta.get("example_value", e) for p, e in zip(placeholders, example_inputs, strict=True)]
    for placeholder, fake, given in zip(placeholders, inputs, example_inputs, strict=True):
        if isinstance(fake, torch.Tensor) and isinstance(given, torch.Tensor) and not _same_layout(fake, given):
            raise ValueError(f"the metadata of input {placeholder} has been changed by the graph itself")
    return inputs


def _same_layout(fake: torch.Tensor, given: torch.Tensor) -> bool:
    if fake.dim() != given.dim():
        return False
    pairs = [*zip(fake.shape, given.shape, strict=True), *zip(fake.stride(), given.stride(), strict=True)]
    # Symbolic sizes are not compared: that would add guards.
    return all(a == b for a, b in pairs if type(a) is int and type(b) is int)


def trace_pre_dispatch(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Retraces a Dynamo graph to ATen, before autograd, on Dynamo's own fake tensors.

    This is AOTAutograd's tracer; ``pre_dispatch`` keeps composite ops such as ``batch_norm`` and ``dropout`` whole.
    """
    # Not tracing_mode="fake": it makes new fakes in the mode that Dynamo keeps for the backend, which know nothing of
    # the item() of a scalar input.
    values = [*inputs, *(node.meta.get("example_value") for node in gm.graph.nodes)]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    grad_mode = torch.is_grad_enabled()
    try:
        with fx.traceback.preserve_node_meta(), modes[0] if modes else contextlib.nullcontext():
            return make_fx(_Checked(gm).run, pre_dispatch=True, tracing_mode="real")(*inputs)
    finally:
        torch.set_grad_enabled(grad_mode)  # a graph may end in another mode than it began in


class _Checked(fx.Interpreter):
    """Runs a Dynamo graph again and compares with what Dynamo saw.

    Autocast, for one, is recorded but not applied while tracing before dispatch: whatever looks at dtypes then goes
    another way, and ``y.float()`` of what should be bfloat16 becomes ``y`` itself.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            for node in n.all_input_nodes:
                self._compare(node, self.env[node], "requires_grad")
        result = super().run_node(n)
        self._compare(n, result, "dtype")
        return result

    def _compare(self, node: fx.Node, now: Any, what: str) -> None:
        before = node.meta.get("example_value")
        both = isinstance(now, torch.Tensor) and isinstance(before, torch.Tensor)
        if both and getattr(now, what) != getattr(before, what):
            raise ValueError(f"{node} has {what} {getattr(now, what)} now, {getattr(before, what)} before")


def carry_placeholders(source: fx.Graph, target: fx.Graph) -> None:
    """Copies names, meta and Dynamo's sources from the inputs of one graph to the inputs of its retrace."""
    old, new = source.find_nodes(op="placeholder"), target.find_nodes(op="placeholder")
    if len(old) != len(new):
        raise ValueError(f"the retraced graph has {len(new)} inputs, the Dynamo graph {len(old)}")
    for before, after in zip(old, new, strict=True):
        after._rename(before.name)
        after.target = after.name
        after.meta.update(before.meta)
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source


def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor", mode=mode, options=options)`` would call."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


def reset_inductor() -> None:
    """What ``torch.compiler.reset`` does for Inductor: forgets recorded CUDA graphs."""
    mode = "reduce-overhead" if torch.cuda.is_available() else None
    torch._TorchCompileInductorWrapper(mode, None, None).reset()
