"""Every private torch name and every version branch of this package, in one place.

Checked on torch 2.11.0, 2.13.0 and 2.14.1. When a torch release moves one of these, this file is the one to change.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

CHECKED_ON = ("2.11.0", "2.13.0", "2.14.1")

# Higher-order ops that run their one body exactly once: a statement inside the body may as well stand before the call.
UNCONDITIONAL_HOPS: tuple[HigherOrderOperator, ...] = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)


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
        module.__class__ = type(old.__name__, old.__bases__, {"__qualname__": old.__qualname__})
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


def frame_modules() -> Iterator[nn.Module]:
    """The modules among the local variables of the frame that Dynamo is compiling; none outside Dynamo."""
    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # no translator is running
        return
    for value in translator.output.local_scope.values():
        if isinstance(value, nn.Module):
            yield value


def trace_pre_dispatch(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Retraces a Dynamo graph to ATen, before autograd, on Dynamo's own fake tensors.

    This is AOTAutograd's tracer; ``pre_dispatch`` keeps composite ops such as ``batch_norm`` and ``dropout`` whole.
    """
    with fx.traceback.preserve_node_meta():
        return make_fx(fx.Interpreter(gm).run, pre_dispatch=True, tracing_mode="fake")(*inputs)


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


def reset_inductor(mode: str | None = None) -> None:
    """What ``torch.compiler.reset`` does for Inductor."""
    torch._TorchCompileInductorWrapper(mode, None, None).reset()
