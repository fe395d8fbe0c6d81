"""Guards on ``training``: which flags Dynamo has read in a compilation, in which code, and how to let go of them."""

import dis
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch.nn.parallel import DistributedDataParallel

from compile_modes._compat.frames import source_name, value_of

_TRAINING = "training"


def flags_read() -> list[tuple[Any, nn.Module]]:
    """The source of each flag that is guarded, and the module whose ``training`` it is."""
    try:
        guards = InstructionTranslator.current_tx().output.guards
    except AttributeError:  # no translation is in progress
        return []
    found: list[tuple[Any, nn.Module]] = []
    for guard in guards:
        source = guard.originating_source
        if isinstance(source, AttrSource) and source.member == _TRAINING:
            module = value_of(source.base)
            if isinstance(module, nn.Module) and source not in [known for known, _ in found]:
                found.append((source, module))
    return found


def guard_identity_instead(sources: Iterable[Any]) -> None:
    """Takes the guards on these flags away, and has the compiled code run for these very modules only."""
    guards = InstructionTranslator.current_tx().output.guards
    for source in sources:
        guards.remove_guards_with_source(source)
        install_guard(source.base.make_guard(GuardBuilder.ID_MATCH))


def traced_code() -> list[types.CodeType]:
    """The code of each function that Dynamo has traced in the compilation in progress, the frame's own among them."""
    context = TracingContext.try_get()
    return list(dict.fromkeys(context.traced_code)) if context is not None else []


def one_graph_per_frame() -> bool:
    """Whether the graph in hand has all that the guards of the compilation in progress stand for."""
    nested = getattr(torch._dynamo.config, "nested_graph_breaks", False)
    return not nested and DistributedDataParallel._get_active_ddp_module() is None  # whose optimizer splits graphs


def touches_flag(code: types.CodeType) -> tuple[bool, bool]:
    """What code does with the attribute ``training`` of anything.

    Returns:
        Whether it reads that of its first argument; and whether it may read that of something else, or write any.
    """
    own, other = False, _TRAINING in code.co_consts  # getattr(module, "training")
    first = code.co_varnames[0] if code.co_argcount else None
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.argval == _TRAINING and instruction.opname.endswith(("_ATTR", "_METHOD")):
            loaded = before is not None and before.opname.startswith("LOAD_FAST") and first is not None
            last = before.argval[-1] if loaded and isinstance(before.argval, tuple) else before and before.argval
            if instruction.opname.startswith("LOAD") and loaded and last == first:
                own = True
            else:
                other = True
        before = instruction
    return own, other


def add_input(graph: fx.Graph, name: str, fake: torch.Tensor) -> fx.Node:
    """Gives a captured graph one more input, the last one, described by a fake tensor."""
    inputs: Sequence[fx.Node] = graph.find_nodes(op="placeholder")
    last = inputs[-1] if inputs else None
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
        added = graph.placeholder(name)
    added.meta["example_value"] = fake
    if any(source_name(node) for node in inputs):  # Dynamo's inputs say where they come from: all of them, or none
        added._dynamo_source = ConstantSource(f"compile_modes_{added.name}")
    return added
