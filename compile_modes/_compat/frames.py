"""Dynamo's side of a compilation in progress: the frame, its guards, where graph inputs come from."""

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.code_context import code_context
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GlobalSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import Source
from torch.utils import _pytree as pytree

from compile_modes._compat.copies import compiler_of

_waiting: "weakref.WeakKeyDictionary[nn.Module, set[Any]]" = weakref.WeakKeyDictionary()  # checks to be run after calls


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo read a graph input from, e.g. ``L['self']._modules['bn']._buffers['running_mean']``; or ``""``."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def frame_modules() -> list[nn.Module]:
    """The modules among the local variables of the frame that Dynamo is compiling; none outside Dynamo."""
    scope = _frame_scope()
    return [value for value in scope["L"].values() if isinstance(value, nn.Module)] if scope else []


def name_graph_module() -> None:
    """Tells Dynamo whose ``forward`` it is compiling, where it does not know, and lets it start the frame again.

    Nodes of an exported module keep their meta, and with it their owners, in the frames of a GraphModule that Dynamo
    knows. ``torch.compile(module)`` names it. ``module.compile()`` does not, nor do wrappers whose hooks stand between
    (DDP, FSDP): there, Dynamo comes upon the module's ``forward`` as a frame of its own.

    Raises:
        TensorifyScalarRestartAnalysis: the one restart that Dynamo takes from backends (2.11 to 2.14).
    """
    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:  # no translation is in progress
        return
    module, context = tx.output.local_scope.get("self"), code_context.get_context(tx.f_code)
    if not isinstance(module, fx.GraphModule) or module.forward.__code__ is not tx.f_code:
        return
    if context.get("orig_graphmodule", lambda: None)() is None:
        context["orig_graphmodule"] = weakref.ref(module)
        raise TensorifyScalarRestartAnalysis(restart_reason="to keep the owners of an exported module's nodes")


def pin_owner(placeholder: fx.Node) -> nn.Module | None:
    """The live module that owns the buffer which Dynamo made a graph input, pinned by a guard on its identity.

    Dynamo shares one compiled graph between instances of a class. Whoever wants to use this very instance needs the
    guard, which the compilation in progress gets here. None if the input is not a buffer of a module.
    """
    module = holder(placeholder)
    if module is not None:
        install_guard(placeholder._dynamo_source.base.base.make_guard(GuardBuilder.ID_MATCH))  # type: ignore[attr-defined]
    return module


def holder(placeholder: fx.Node) -> nn.Module | None:
    """The live module that holds the parameter or buffer which Dynamo made a graph input; None if it is none."""
    source = getattr(placeholder, "_dynamo_source", None)
    owner = getattr(getattr(source, "base", None), "base", None)  # module ._buffers ['running_mean']
    if _frame_scope() is None or not isinstance(owner, Source):
        return None
    module = value_of(owner)
    return module if isinstance(module, nn.Module) else None


def value_of(source: Any) -> Any:
    """What Dynamo has read from a source in the frame that it is compiling."""
    name = source.name
    return eval(name() if callable(name) else name, _frame_scope())  # an expression of its guards


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
    """Whether a Dynamo graph holds all ops of the compiled module, or function: no graph break has parted them."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:
        return not getattr(reason, "graph_break", False)
    if getattr(reason, "graph_break", False) or tx.f_code.co_name.startswith("torch_dynamo_resume_in_"):
        return False
    root = compiled_root()
    # Where Dynamo can't compile the module's own function, it compiles those that are called from there.
    return root is None or tx.f_code in _entries(root) or tx.output.local_scope.get("fn") in (root, root.forward)


def _entries(root: nn.Module) -> set[Any]:
    """The code of the functions by which a call of a module enters it."""
    entries = (root.forward, nn.Module._call_impl, nn.Module._wrapped_call_impl)
    return {getattr(entry, "__code__", None) for entry in entries}


def pin_variable(variable: str) -> None:
    """Guards the compilation in progress on the identity of the module in a variable, such as ``L['self']``."""
    kind, name = variable[0], variable[3:-2]
    source = LocalSource(name) if kind == "L" else GlobalSource(name)
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


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


def carry_results(source: fx.Graph, target: fx.Graph) -> None:
    """Describes inputs and results of the retrace of a body as Dynamo did, in the one place where torch looks for it.

    Higher-order ops ask there which results need a gradient. The tracer's own snapshots never need one.
    """
    old, new = (pytree.tree_leaves(graph.output_node().args) for graph in (source, target))
    if len(old) != len(new):
        raise ValueError(f"the retraced graph returns {len(new)} values, the Dynamo graph {len(old)}")
    for before, after in zip(old, new, strict=True):
        if isinstance(before, fx.Node) and isinstance(after, fx.Node):
            after.meta["example_value"] = before.meta.get("example_value")
            after.meta.pop("val", None)
    for placeholder in target.find_nodes(op="placeholder"):
        placeholder.meta.pop("val", None)


def carry_placeholders(source: fx.Graph, target: fx.Graph) -> None:
    """Copies names, meta and Dynamo's sources from the inputs of one graph to the inputs of its retrace."""
    old, new = source.find_nodes(op="placeholder"), target.find_nodes(op="placeholder")
    if len(old) != len(new):
        raise ValueError(f"the retraced graph has {len(new)} inputs, the Dynamo graph {len(old)}")
    for before, after in zip(old, new, strict=True):
        after._rename(before.name)
        after.target = after.name
        # Not what Dynamo takes back at the end: it watches parameters, which torch then refuses to swap.
        after.meta.update({key: value for key, value in before.meta.items() if key != "grapharg"})
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source


def guarded() -> list[str]:
    """What Dynamo has read so far in the compilation in progress, such as ``L['self']._modules['bn'].training``."""
    try:
        guards = InstructionTranslator.current_tx().output.guards
    except AttributeError:  # no translation is in progress
        return []
    names = (guard.name for guard in guards)
    return sorted({str(name() if callable(name) else name) for name in names})


def roots_read() -> dict[str, nn.Module]:
    """The modules among the variables that Dynamo has read, by variable: ``{"L['self']": module}``."""
    scope = _frame_scope() or {}
    found = {}
    for kind, variables in scope.items():
        for name, value in variables.items():
            if isinstance(value, nn.Module):
                found[f"{kind}[{name!r}]"] = value
    read = {name.partition("]")[0] + "]" for name in guarded()}
    return {variable: module for variable, module in found.items() if variable in read}


def traces_rnns() -> bool:
    """Whether Dynamo compiles functions that call RNN modules. By default it leaves all of such a function to eager."""
    return bool(torch._dynamo.config.allow_rnn)


def traces_numbers() -> bool:
    """Whether Dynamo compiles functions that take a number out of a tensor. By default a graph ends there."""
    return bool(torch._dynamo.config.capture_scalar_outputs)


def compiled_root() -> nn.Module | None:
    """The module that the running call of a compiled module belongs to, as its user knows it; None outside one.

    Dynamo compiles a submodule by itself where it can't compile its parent, and names of the submodule begin there.
    """
    return _inside(_compiled_call())


def _inside(called: nn.Module | None) -> nn.Module | None:
    return called._orig_mod if isinstance(called, torch._dynamo.OptimizedModule) else called


def _compiled_call() -> nn.Module | None:
    """What is being called: the module that ``torch.compile`` returned, or one that was compiled in place."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch._dynamo.OptimizedModule):
            return module
        if isinstance(module, nn.Module) and module._compiled_call_impl is not None:
            return module
        frame = frame.f_back
    return None


def at_compilations(callback: Callable[[Any], None]) -> None:
    """Has Dynamo call a function at the start of each compilation, until ``torch._dynamo.reset()``."""
    if callback not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(callback)


def options_for(backend: Callable[..., Any]) -> dict[str, Any] | None:
    """The options of the running call of a module that is compiled by ``backend``; None for others."""
    for compiler in map(compiler_of, _callbacks(_compiled_call())):
        if getattr(compiler, "compiler_fn", None) is backend:
            options: dict[str, Any] | None = compiler.kwargs.get("options")
            return options
    return None


def _callbacks(called: nn.Module | None) -> list[Any]:
    """What Dynamo calls to compile a module, as far as it can be found."""
    if isinstance(called, torch._dynamo.OptimizedModule):
        return [called.dynamo_ctx.callback]
    call: Any = called._compiled_call_impl if called is not None else None
    compiled = inspect.unwrap(call, stop=_is_dynamos) if call is not None else None
    return [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]


def _is_dynamos(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def after_calls(key: Any, check: Callable[[nn.Module], bool]) -> None:
    """Has ``check(module)`` run after each later call of the compiled module that is being called, until it says False.

    Args:
        key: only one check of the same key is ever waiting.
        check: takes the module as its user knows it.
    """
    called = _compiled_call()
    if called is None or key in _waiting.setdefault(called, set()):
        return
    waiting = _waiting[called]
    waiting.add(key)

    def over() -> bool:
        if torch.compiler.is_compiling() or check(_inside(called)):  # type: ignore[arg-type]
            return False
        waiting.discard(key)
        return True

    if isinstance(called, torch._dynamo.OptimizedModule):
        hooks: list[Any] = [called.register_forward_hook(lambda *_: hooks.pop().remove() if over() else None)]
        return
    original: Any = called._compiled_call_impl

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if over() and called._compiled_call_impl is call:
            called._compiled_call_impl = original
        return result

    called._compiled_call_impl = call
