"""Inductor's Triton code for CUDA on a machine without a GPU: fake cuda tensors, and stand-ins for what a GPU is asked.

Only the questions are stood in for: what the device is called, how many processors it has, which target Triton builds
for. Dynamo, the backend, AOTAutograd and Inductor are torch's own, up to the point where Inductor would load the code
that it has written; ``compile_fake`` keeps that code instead. Every name that is replaced must exist: a torch that has
moved raises :class:`Moved`, which says what to look for, instead of passing for the wrong reason.
"""

import contextlib
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import codecache
from torch._inductor import config as inductor_config
from torch._inductor import utils as inductor_utils
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton as triton_utils

from triton_cuda.inductor_programs import Moved, Program, Saved, parse

DEVICE = "cuda:0"
_A100 = types.SimpleNamespace(
    name="NVIDIA A100", major=8, minor=0, multi_processor_count=108, warp_size=32, total_memory=80 << 30,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=163 << 10, L2_cache_size=40 << 20,
    shared_memory_per_multiprocessor=164 << 10, gcnArchName="",
)  # fmt: skip


def unavailable() -> str:
    """Why this can't run here; ``""`` if it can. A CPU build aborts the process on fake cuda tensors."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return "" if triton_utils.has_triton_package() else "triton is not installed"


class _Ran(Exception):
    """The compiled forward has been called, so that everything is compiled: from here on a GPU would be needed."""


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Answers for an A100 wherever torch and Triton ask for the device; everything is put back afterwards."""
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 80, 32))
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: _A100,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    interface = device_interface.CudaInterface
    replaced: list[tuple[Any, str, Any]] = [(interface, name, staticmethod(f)) for name, f in answers.items()]
    for name in ("current_device", "get_device_properties"):
        replaced.append((interface.Worker, name, staticmethod(answers[name])))
        replaced.append((torch.cuda, name, answers[name]))
    replaced += [
        (torch.cuda, "get_device_capability", lambda device=None: (_A100.major, _A100.minor)),
        (torch.autograd, "grad", grad),  # AOTAutograd differentiates by this name
        (triton.runtime.driver, "_active", driver),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
    ]
    inductor = {
        "joint_graph_constant_folding": False,  # it would run ops on the device
        "shape_padding": False,  # and so would its benchmark
        "compile_threads": 1,
        "fx_graph_cache": False,
        "fallback_random": False,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_devices)
        for owner, name, stand_in in replaced:
            if not hasattr(owner, name):
                where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__
                raise Moved(f"{where}.{name} does not exist, which is replaced while there is no GPU")
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        _forget_devices()
        stack.enter_context(inductor_config.patch(inductor))
        stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        yield


def _forget_devices() -> None:
    """Clears what torch remembers of the devices that it has found."""
    remembered = [*vars(triton_utils).values(), *vars(inductor_utils).values()]
    remembered += [hints.DeviceProperties.create, codecache.CacheBase.get_system]
    for function in remembered:
        if callable(clear := getattr(function, "cache_clear", None)):
            clear()


def fake(build: Callable[[], Any]) -> Any:
    """Runs ``build`` with all tensors that it makes being fake ones on cuda:0."""
    with FakeTensorMode(), torch.device(DEVICE):
        return build()


def compile_fake(module: nn.Module, inputs: Sequence[torch.Tensor], **kwargs: Any) -> tuple[Program, Program | None]:
    """Compiles a module of fake cuda tensors by ``torch.compile(module, **kwargs)``.

    Args:
        module: made by :func:`fake`, as are its inputs.
        inputs: one call's.
        kwargs: of ``torch.compile``.

    Returns:
        The forward, and the backward if autograd needs one.

    Raises:
        Moved: torch no longer goes the way that is stood in for.
    """
    lowered: dict[bool, tuple[GraphLowering, str]] = {}
    called: list[list[torch.Tensor]] = []

    def compile_to_module(graph: GraphLowering) -> Any:
        wrapper, _ = graph.codegen()
        if bool(graph.is_backward) in lowered:
            raise Moved("a second graph is compiled, where one forward and one backward are expected")
        lowered[bool(graph.is_backward)] = graph, wrapper.value
        return types.SimpleNamespace(call=stop, __file__="")

    def stop(arguments: list[torch.Tensor]) -> None:
        called.append(list(arguments))
        raise _Ran

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(stand_ins())
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", compile_to_module))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        with contextlib.suppress(_Ran):
            torch.compile(module, **kwargs)(*inputs)
    torch._dynamo.reset()
    if len(called) != 1 or False not in lowered:
        raise Moved(f"a forward should be compiled and called once; it was called {len(called)} times")
    forward, code = lowered[False]
    names = dict(zip(forward.graph_input_names, _names(module, inputs, called[0]), strict=True))
    first = parse(code, names, forward.mutated_inputs)
    return first, _backward(first, names, *lowered[True]) if True in lowered else None


def _backward(forward: Program, names: Mapping[str, str], graph: GraphLowering, code: str) -> Program:
    """Reads a backward, whose inputs are what the forward returned last, then the gradients of its outputs.

    A kept view of the module's state goes by the name of that state: which of the two the partitioner keeps depends on
    who has made the graph, and costs the same.
    """
    kept = [name for name in graph.graph_input_names if not name.startswith("tangents")]
    sources = forward.returns[len(forward.returns) - len(kept) :]
    state = set(names.values())
    called = dict(names)
    saved = {}
    for name, source in zip(kept, sources, strict=True):
        value = graph.graph_inputs[name]
        if names.get(name, source) != source:
            raise Moved(f"the backward's input {names[name]} is not what the forward returned there, {source}")
        if source in state:
            called[name] = source
        saved[called.get(name, name)] = Saved(source, tuple(map(int, value.get_size())), value.get_dtype())
    return parse(code, called, graph.mutated_inputs, saved)


def _names(module: nn.Module, inputs: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor]) -> list[str]:
    """What the arguments of compiled code are in the module: by storage, for AOTAutograd may pass aliases."""
    known = [*module.named_parameters(), *module.named_buffers(), *((f"input{i}", t) for i, t in enumerate(inputs))]
    names = {tensor.untyped_storage()._cdata: name for name, tensor in known}
    return [names[tensor.untyped_storage()._cdata] for tensor in arguments]


def grad(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor | None],
    allow_unused: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """``torch.autograd.grad`` in Python: the engine's threads per device don't exist where there is no device."""
    wanted = [torch.autograd.graph.get_gradient_edge(t) for t in inputs]
    ends = {edge.node for edge in wanted}
    arrived: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    roots = [torch.autograd.graph.get_gradient_edge(t) for t in outputs]
    with torch.no_grad():
        for root, gradient in zip(roots, grad_outputs, strict=True):
            _arrive(arrived, root.node, root.output_nr, gradient)
        for node in reversed(_topological([root.node for root in roots], ends)):
            if node in ends or not arrived[node]:
                continue
            gradients = node(*(arrived[node].get(i) for i in range(len(node._input_metadata))))
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for (target, index), gradient in zip(node.next_functions, gradients, strict=True):
                if target is not None:
                    _arrive(arrived, target, index, gradient)
    found = tuple(arrived[edge.node].get(edge.output_nr) for edge in wanted)
    if not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError("an input has no gradient")
    return found


def _arrive(arrived: dict[Any, dict[int, torch.Tensor]], node: Any, index: int, gradient: torch.Tensor | None) -> None:
    """Adds a gradient to what has come to an input of a node, cast and summed to its shape, as the engine does."""
    if gradient is None:
        return
    expected = node._input_metadata[index]
    if gradient.shape != torch.Size(expected.shape):
        gradient = gradient.sum_to_size(expected.shape)
    gradient = gradient.to(expected.dtype)
    before = arrived[node].get(index)
    arrived[node][index] = gradient if before is None else before + gradient


def _topological(roots: Sequence[Any], ends: set[Any]) -> list[Any]:
    """The nodes below ``roots`` down to ``ends``, each after all that it leads to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(node, False) for node in reversed(roots)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in ends:
                stack += [(target, False) for target, _ in node.next_functions if target is not None]
    return order
