"""Every private torch name and every version branch of this package, in one place.

Checked on torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0. When torch moves one of these, this file is the one to change.
"""

import copy
import json
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._decomp.decompositions import one_layer_lstm
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._export.serde import serialize as serde
from torch._export.serde.schema import ExportedProgram as ProgramSchema
from torch._export.serde.schema import PayloadConfig
from torch._export.serde.schema import PayloadMeta as PayloadMeta
from torch._guards import Source
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor

# Base of BatchNorm1d to 3d, SyncBatchNorm and the lazy ones: the modules whose forward advances num_batches_tracked.
BATCH_NORM = nn.modules.batchnorm._BatchNorm
# F.batch_norm's check in train: raises ValueError for a batch with one value per channel, which has no variance.
check_batch_size: Callable[[Sequence[int]], None] = nn.functional._verify_batch_size  # type: ignore[attr-defined]
DROPOUT = nn.modules.dropout._DropoutNd  # base of Dropout, Dropout1d to 3d, AlphaDropout and FeatureAlphaDropout
# A failed export leaves its hook here (torch 2.11), and Dynamo then breaks graphs wherever a buffer is assigned.
BUFFER_HOOKS: dict[int, Any] = nn.modules.module._global_buffer_registration_hooks

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


def draws_random_numbers(target: Any) -> bool:
    """Whether a call consumes numbers of the default generator, by torch's own tag."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


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


def value(node: fx.Node) -> Any:
    """The fake tensor or number that a node stood for when its graph was traced, under ATen's name or Dynamo's."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def may_require_grad(node: fx.Node) -> bool:
    """Whether a graph input may need a gradient: what Dynamo saw, or, where it left no word, yes."""
    seen = node.meta.get("example_value")
    return seen.requires_grad if isinstance(seen, torch.Tensor) else not isinstance(seen, int | float | torch.SymInt)


def grad_mode(node: fx.Node, before: bool) -> bool:
    """The grad mode that a node switches to, for its body or for all that follows; ``before`` if it does not."""
    switches = node.target in (torch._C._set_grad_enabled, torch.ops.higher_order.wrap_with_set_grad_enabled)
    return bool(node.args[0]) if switches else before


def lstm_steps(
    value: torch.Tensor,
    state: Sequence[torch.Tensor],
    params: tuple[torch.Tensor, ...],
    has_biases: bool,
    *,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One direction of one LSTM layer as AOTAutograd takes it apart for training: output, and last state."""
    result: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = one_layer_lstm(
        value, state, params, has_biases, reverse=reverse
    )
    return result


def last_state(value: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The state after a recurrent layer, in the shape of the one before it.

    Up to torch 2.11, if not 2.12, the decomposition of ``lstm`` gives it a dimension of size 1 too many, unless it has
    chosen the inference kernel. Which one it will choose is not known while tracing, so the shape is asked for always.
    """
    return value if torch.__version__ >= "2.13" else value.view(first.shape)


def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor", mode=mode, options=options)`` would call."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


def reset_inductor() -> None:
    """What ``torch.compiler.reset`` does for Inductor: forgets recorded CUDA graphs."""
    mode = "reduce-overhead" if torch.cuda.is_available() else None
    torch._TorchCompileInductorWrapper(mode, None, None).reset()


# From here on: what torch's .pt2 archives consist of.
script_object_to_bytes, script_object_from_bytes = torch._C._pickle_save, torch._C._pickle_load_obj
serialize_tensor_meta = serde.serialize_tensor_meta


def payloads_to_json(payloads: dict[str, PayloadMeta]) -> bytes:
    """What describes one program's weights, or constants, beside the payloads that hold their bytes."""
    return json.dumps(serde._dataclass_to_dict(PayloadConfig(config=payloads))).encode()


def payloads_from_json(text: bytes) -> dict[str, PayloadMeta]:
    """The reverse of :func:`payloads_to_json`."""
    return dict(serde._dict_to_dataclass(PayloadConfig, json.loads(text)).config)


def payload_place(payload: PayloadMeta) -> tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...], int]:
    """Dtype, device, sizes, strides and storage offset of a tensor."""
    meta: Any = payload.tensor_meta
    sizes, strides = serde.deserialize_size(meta.sizes), serde.deserialize_stride(meta.strides)
    offset = serde.deserialize_storage_offset(meta.storage_offset)
    return serde.deserialize_scalar_type(meta.dtype), serde.deserialize_device(meta.device), sizes, strides, offset


def program_to_bytes(program: torch.export.ExportedProgram, *stand_ins: dict[str, Any]) -> tuple[bytes, bytes]:
    """A program as JSON, and its example inputs, pickled; torch 2.11 pickles state and constants in vain as well."""
    program = copy.copy(program)
    program._state_dict, program._constants = stand_ins
    artifact = serde.serialize(program)
    return artifact.exported_program, artifact.example_inputs


def program_from_bytes(text: bytes, *held: Any) -> torch.export.ExportedProgram:
    """The program of :func:`program_to_bytes` around the very state, constants and example inputs given."""
    return serde.ExportedProgramDeserializer().deserialize(serde._bytes_to_dataclass(ProgramSchema, text), *held)
