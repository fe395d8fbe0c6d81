"""Dynamo's side of a compilation in progress: the frame, its guards, where graph inputs come from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import Source
from torch.utils import _pytree as pytree


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
        after.meta.update(before.meta)
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
