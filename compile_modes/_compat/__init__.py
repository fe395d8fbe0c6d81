"""Every private torch name and every version branch of this package, in one place.

Checked on torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0. When torch moves one of these, this folder is the one to change:
``frames`` has what knows of a compilation in progress, ``archives`` what torch's .pt2 files consist of, ``kept`` what a
retrace must not run, ``tracing`` the tracer.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._decomp.decompositions import one_layer_lstm
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._inductor import config as inductor_config
from torch._logging._internal import trace_log, trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor

from compile_modes._compat.direct_calls import GUARDS as GUARDS
from compile_modes._compat.direct_calls import enter_directly, is_direct

# Base of BatchNorm1d to 3d, SyncBatchNorm and the lazy ones: the modules whose forward advances num_batches_tracked.
BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = nn.modules.batchnorm._NormBase  # base of those, and of InstanceNorm1d to 3d
# F.batch_norm's check in train: raises ValueError for a batch with one value per channel, which has no variance.
check_batch_size: Callable[[Sequence[int]], None] = nn.functional._verify_batch_size  # type: ignore[attr-defined]
DROPOUT = nn.modules.dropout._DropoutNd  # base of Dropout, Dropout1d to 3d, AlphaDropout and FeatureAlphaDropout
# A failed export leaves its hook here (torch 2.11), and Dynamo then breaks graphs wherever a buffer is assigned.
BUFFER_HOOKS: dict[int, Any] = nn.modules.module._global_buffer_registration_hooks

# Raised through backends on purpose: Dynamo answers them by another attempt or by leaving the frame alone.
CONTROL_FLOW = (RestartAnalysis, SkipFrame)

# What export calls the pass that gave nodes of ep.module() their names.
EXPORTED = "ExportedProgram.module()"

# Higher-order ops that run their one body exactly once: a statement inside the body may as well stand before the call.
AUTOCAST: HigherOrderOperator = torch.ops.higher_order.wrap_with_autocast
UNCONDITIONAL_HOPS: tuple[HigherOrderOperator, ...] = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    AUTOCAST,
    torch.ops.higher_order.tag_activation_checkpoint,
)

# Those that pass their operands to the one body in order. AOTAutograd refuses to train a body of the last that writes.
PASSING_HOPS = (*UNCONDITIONAL_HOPS, torch.ops.higher_order.invoke_subgraph)


def aten_overload(name: str) -> OpOverload | None:
    """The overload ``aten::<name>`` (``stem`` or ``stem.overload``), or None if this torch has none."""
    stem, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, stem, None)
    found = getattr(packet, overload or "default", None)
    return found if isinstance(found, OpOverload) else None


def is_literal(name: str) -> bool:
    """Whether ``torch.export`` has made up the name of a constant: that of ``torch.tensor(1.0)`` in a model's code."""
    return name.rpartition(".")[2].startswith(("lifted_tensor_", "_tensor_constant"))


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
        enter_directly(module)
        if "__signature__" in vars(module):
            sign(module, vars(module)["__signature__"])
    else:  # UnflattenedModule and InterpreterModule keep a GraphModule beside their graph
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not reference an nn.Module.*")
            module.finalize()  # type: ignore[operator]


def sign(module: nn.Module, signature: inspect.Signature) -> None:
    """Lets ``inspect.signature`` of a module say the names of its arguments, and that of a generated ``forward``.

    ``torch.export`` takes the names of a program's inputs from there. A ``forward`` that torch generates has the
    arguments that were exported by name in the order of that call, whatever their order in the model. Trainers ask
    ``forward`` which columns of a data set to keep; where it is one for all modules of a class, the module gets a class
    with one of its own.
    """
    module.__dict__["__signature__"] = signature
    kind: Any = type(module)
    if not isinstance(module, fx.GraphModule):
        object.__setattr__(module, "__class__", _signed(kind, signature))  # wrappers hand attributes on
    elif not is_direct(module):
        kind.forward.__signature__ = _with_self(signature)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[first, *signature.parameters.values()])


@functools.cache
def _signed(kind: Any, signature: inspect.Signature) -> type[nn.Module]:
    """A class whose ``forward`` says the names of its arguments.

    One for all modules of a class and a signature, which share what Dynamo has compiled.
    """
    known: Any = kind.forward
    forward: Any = types.FunctionType(
        known.__code__, known.__globals__, known.__name__, known.__defaults__, known.__closure__
    )
    forward.__kwdefaults__ = known.__kwdefaults__
    forward.__dict__.update(vars(known))  # torch's marks of what it must not compile
    forward.__doc__, forward.__qualname__, forward.__module__ = known.__doc__, known.__qualname__, known.__module__
    forward.__signature__ = _with_self(signature)
    kept = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**kept, "forward": forward})


def value(node: fx.Node) -> Any:
    """The fake tensor or number that a node stood for when its graph was traced, under ATen's name or Dynamo's."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def may_require_grad(node: fx.Node) -> bool:
    """Whether a graph input may need a gradient: what Dynamo saw, or, where it left no word, yes."""
    seen = node.meta.get("example_value")
    return seen.requires_grad if isinstance(seen, torch.Tensor) else not isinstance(seen, int | float | torch.SymInt)


def numel_at_least(shape: Sequence[int | torch.SymInt]) -> int:
    """How many elements a tensor has at least, whatever sizes its graph is called with; guards on nothing."""
    count = 1
    for size in shape:
        if isinstance(size, torch.SymInt):
            environment: Any = size.node.shape_env
            low = environment.bound_sympy(size.node.expr).lower
            count *= max(int(low), 0) if low.is_finite else 0
        else:
            count *= size
    return count


def example_like(fake: torch.Tensor) -> torch.Tensor:
    """Zeros of the sizes that a fake tensor was traced with, at least 2 where a size may vary: 0 and 1 are special."""

    def size(of: int | torch.SymInt) -> int:
        return of if isinstance(of, int) else max(getattr(of.node, "hint", None) or 2, 2)

    return torch.zeros([size(of) for of in fake.shape], dtype=fake.dtype, device=fake.device)


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


def in_steps(target: OpOverload) -> Callable[..., Any] | None:
    """What torch takes ``gru``, ``rnn_tanh`` or ``rnn_relu`` apart into; without the dropout between their layers."""
    kernels: dict[Any, Callable[..., Any]] = target.py_kernels
    return kernels.get(torch._C.DispatchKey.CompositeImplicitAutograd)


def last_state(value: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The state after a recurrent layer, in the shape of the one before it.

    Up to torch 2.11, if not 2.12, the decomposition of ``lstm`` gives it a dimension of size 1 too many, unless it has
    chosen the inference kernel. Which one it will choose is not known while tracing, so the shape is asked for always.
    """
    return value if torch.__version__ >= "2.13" else value.view(first.shape)


def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor", mode=mode, options=options)`` would call."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


def draws_as_eager() -> bool:
    """Whether what Inductor compiles draws the random numbers that eager draws, as far as all modules are concerned."""
    return bool(inductor_config.fallback_random)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Adds a text to the structured trace that ``TORCH_TRACE`` asks for and tlparse shows; no work without it."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def is_traced() -> bool:
    """Whether the structured trace is written; torch's own handler finds out when it is first needed."""
    return any(getattr(handler, "root_dir", True) for handler in trace_log.handlers)


def reset_inductor() -> None:
    """What ``torch.compiler.reset`` does for Inductor: forgets recorded CUDA graphs."""
    mode = "reduce-overhead" if torch.cuda.is_available() else None
    torch._TorchCompileInductorWrapper(mode, None, None).reset()
