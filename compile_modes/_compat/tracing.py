"""AOTAutograd's tracer, and the graph that it is tracing, to write into by hand."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree


def trace(function: Callable[..., Any], inputs: Sequence[Any], values: Sequence[Any]) -> fx.GraphModule:
    """AOTAutograd's tracer; ``pre_dispatch`` keeps composite ops such as ``batch_norm`` and ``dropout`` whole."""
    # Not tracing_mode="fake": it makes new fakes in the mode that Dynamo keeps for the backend, which know nothing of
    # the item() of a scalar input.
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext():
        return make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)


@contextlib.contextmanager
def faking(like: Any) -> Iterator[None]:
    """Lets operators called by hand compute with fake tensors of symbolic sizes, in the mode of one of them."""
    mode = like.fake_mode if isinstance(like, FakeTensor) else contextlib.nullcontext()
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


def trace_in_place_of(node: fx.Node, function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a function to ATen before autograd, on fake tensors; each new node takes over the meta of ``node``."""
    with fx.traceback.preserve_node_meta(), fx.traceback.set_current_meta(node):
        return trace(function, inputs, inputs)


class Recorder:
    """Adds nodes to the graph of the trace in progress."""

    def __init__(self) -> None:
        mode = get_proxy_mode()
        assert mode is not None, "nothing is being traced"
        self._tracer: Any = mode.tracer

    def operand(self, value: Any) -> Any:
        """What stands for a traced value in a node's arguments: a node, or the value itself if it is a constant."""
        proxy = self._tracer.unwrap_proxy(value)
        if isinstance(proxy, fx.Proxy):
            return proxy.node
        if isinstance(value, torch.Tensor | nn.Module):
            raise ValueError(f"a {type(value).__name__} that the trace does not know is an operand")
        return value

    def attribute(self, node: fx.Node, value: Any) -> fx.Node:
        """A node for something that the new graph holds, under the name that it had, or one like it."""
        stem, count = str(node.target).replace(".", "_"), 0
        while getattr(self._tracer.root, name := f"{stem}_{count}" if count else stem, value) is not value:
            count += 1
        setattr(self._tracer.root, name, value)
        held: fx.Node = self._tracer.create_node("get_attr", name, (), {})
        held.meta = dict(node.meta)
        return held

    def copy(self, node: fx.Node, operand: Callable[[fx.Node], Any]) -> fx.Node:
        """Copies a node of another graph, with its meta."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        copied: fx.Node = self._tracer.create_node(node.op, node.target, args, kwargs)
        copied.meta = dict(node.meta)
        return copied

    def result(self, node: fx.Node, value: Any) -> Any:
        """Makes what a node would have returned known to the trace as its result.

        Args:
            node: a node of the new graph.
            value: fake tensors and symbolic numbers, which other nodes may have too.

        Returns:
            The same with tensors of their own.
        """
        with disable_proxy_modes_tracing():
            own = pytree.tree_map_only(torch.Tensor, _alias, value)
        return track_tensor_tree(own, fx.Proxy(node, self._tracer), constant=None, tracer=self._tracer)


def _alias(value: torch.Tensor) -> torch.Tensor:
    # Unseen by the tracer's function mode, which would record the grad mode.
    with torch._C.DisableTorchFunction(), torch.set_grad_enabled(value.requires_grad):
        alias: torch.Tensor = torch.ops.aten.alias.default(value)
    return alias
