"""What of a Dynamo graph a retrace must not run, and what it must run beside recording it."""

import enum
import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator


class Treatment(enum.Enum):
    """What a retrace does with a node: run it, copy it into the new graph without running it, or both."""

    RUN = enum.auto()
    COPY = enum.auto()
    SWITCH = enum.auto()  # changes what surrounds the following nodes, and is not recorded by itself


# Higher-order ops whose graphs are run as they stand, whatever their number, order and occasion. The graphs of others
# (gradients of autograd.Function, hooks, score modifications) are part of a contract that a rewrite would break.
_RUN_BODIES = frozenset(
    {
        "tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "wrap_with_set_grad_enabled",
        "wrap_with_autocast", "invoke_subgraph", "cond", "switch", "while_loop", "scan", "associative_scan",
        "map_impl", "strict_mode", "local_map_hop",
    }
)  # fmt: skip
# Those that call a function of which the graph holds no graph.
_CALL_FUNCTIONS = frozenset({"flat_apply", "invoke_leaf_function"})

# Between them, values are functorch's wrappers, of which no retrace makes plain ones. By name: they have moved between
# modules since 2.11.
_OPENING = frozenset({"_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting",
                      "_func_increment_nesting", "_enter_dual_level"})  # fmt: skip
_CLOSING = frozenset({"_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting",
                      "_func_decrement_nesting", "_exit_dual_level"})  # fmt: skip

_enter_autocast, _exit_autocast = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_enter_inference = torch.autograd.grad_mode._enter_inference_mode
_exit_inference = torch.autograd.grad_mode._exit_inference_mode
_SDPA_KERNEL = torch.nn.attention._sdpa_kernel
_SWITCHES = frozenset({_enter_autocast, _exit_autocast, _enter_inference, _exit_inference, _SDPA_KERNEL})
_SDPA_FLAGS = ("flash", "mem_efficient", "math", "cudnn", "overrideable")

# Home of functions that act on the state of autograd and functorch: .data, hooks, vmap, grad, jvp.
_STATEFUL_MODULES = ("torch.autograd", "torch._C._autograd", "torch._functorch", "torch._C._functorch")

# Home of the Python functions that only compute. Any other (a user's allow_in_graph function, say) may carry autograd
# or change global state inside, of which a retrace records nothing.
_PURE_MODULES = ("torch.nn.functional", "torch.functional", "torch._jit_internal", "torch._tensor", "torch.fx",
                 "torch._dynamo", "torch.linalg", "torch.fft", "torch.special", "math", "operator", "_operator",
                 "builtins")  # fmt: skip


# Home of the functions that Dynamo makes around one of the user's (nonstrict_trace) for a graph to call.
_WRAPPERS = ("torch._dynamo.variables",)


def treatment(target: Any) -> Treatment:
    """What a retrace does with a call of a function; grad mode counts as computing, for the tracer records it."""
    if isinstance(target, HigherOrderOperator):
        return Treatment.COPY
    if target in _SWITCHES:
        return Treatment.SWITCH
    name, home = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
    if _below(home, (*_STATEFUL_MODULES, *_WRAPPERS)) or (
        name.startswith(("set_", "_set_")) and name != "_set_grad_enabled"
    ):
        return Treatment.COPY
    if isinstance(target, types.FunctionType) and home != "torch" and not _below(home, _PURE_MODULES):
        return Treatment.COPY
    return Treatment.RUN


def _below(home: str, modules: Sequence[str]) -> bool:
    return any(home == module or home.startswith(module + ".") for module in modules)


def runs_bodies(target: Any) -> bool:
    """Whether a call runs the graphs among its operands as they stand."""
    return isinstance(target, HigherOrderOperator) and target._name in _RUN_BODIES


def is_opaque_function(target: Any) -> bool:
    """Whether a call that is copied calls a function of the user's, whose ops no graph shows."""
    if isinstance(target, HigherOrderOperator):
        return target._name in _CALL_FUNCTIONS
    home = getattr(target, "__module__", None) or ""
    return isinstance(target, types.FunctionType) and (_below(home, _WRAPPERS) or not _below(home, ("torch",)))


def nesting(target: Any) -> int:
    """1 for what opens a functorch transform or a level of forward AD, -1 for what closes one, else 0."""
    name = getattr(target, "__name__", "") if callable(target) else ""
    return (name in _OPENING) - (name in _CLOSING)


def is_wrapped(value: Any) -> bool:
    """Whether a fake tensor is one of functorch's wrappers, in use or outlived."""
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


class Surroundings:
    """What the nodes of a graph switch for those after them: grad mode, autocast, inference mode, attention kernels.

    A context manager, behind which all is as it was before.
    """

    def __init__(self) -> None:
        self._open: dict[fx.Node, AbstractContextManager[Any]] = {}

    def __enter__(self) -> "Surroundings":
        self._grad_mode = torch.is_grad_enabled()
        self._sdpa = {name: getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in _SDPA_FLAGS}
        self._sdpa_order = torch._C._get_sdp_priority_order()
        return self

    def __exit__(self, *exception: object) -> None:
        with torch._C.DisableTorchFunction():
            for context in reversed(self._open.values()):
                context.__exit__(None, None, None)
            self._open.clear()
            torch._C._set_grad_enabled(self._grad_mode)
            for name, enabled in self._sdpa.items():
                getattr(torch._C, f"_set_sdp_use_{name}")(enabled)
            torch._C._set_sdp_priority_order(self._sdpa_order)

    def switch(self, node: fx.Node) -> None:
        """Does what a node does to the nodes after it, without anything of it being recorded."""
        with torch._C.DisableTorchFunction():
            if node.target is _enter_autocast:
                self._enter(node, _autocast(node.args))
            elif node.target is _enter_inference:
                self._enter(node, torch.inference_mode(bool(node.args[0])))
            elif node.target in (_exit_autocast, _exit_inference):
                self._open.pop(node.args[0]).__exit__(None, None, None)  # type: ignore[arg-type]
            elif node.target is _SDPA_KERNEL:
                _SDPA_KERNEL(*fx.map_arg(node.args, _called))
            elif node.target is torch._C._set_grad_enabled:
                torch._C._set_grad_enabled(node.args[0])

    def _enter(self, node: fx.Node, context: AbstractContextManager[Any]) -> None:
        context.__enter__()
        self._open[node] = context


def _called(node: Any) -> Any:
    """The result of a node that only makes a constant of constants."""
    return node.target(*node.args, **node.kwargs)


def _autocast(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Autocast without its cache, which would keep casts of one trace's fake tensors for another's."""
    device, dtype, enabled, _ = args
    return torch.autocast(device, dtype, enabled, False)


@contextmanager
def surroundings_of_body(call: fx.Node) -> Iterator[None]:
    """The grad mode or autocast in which a call runs its graph, if it sets one."""
    with ExitStack() as stack:
        if call.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            stack.enter_context(torch.set_grad_enabled(bool(call.args[0])))
        elif call.target is torch.ops.higher_order.wrap_with_autocast:
            stack.enter_context(_autocast(call.args[:4]))
        yield
