"""Inductor's side of a custom pass: its base class, and what its cache key must know of the graph.

Checked on torch 2.11.0, 2.13.0 and 2.14.1. Inductor calls ``pre_grad_custom_pass`` with Dynamo's graph, after its own
pre-grad passes, for each body of a higher-order op and then for the root. Up to torch 2.12, if not later, that is
before the lookup in AOTAutogradCache, whose key is then the rewritten graph. Since torch 2.13, it is after the lookup,
if the pass has a ``uuid()``; the key is the text of the graph as it came, and that ``uuid()``.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass

from compile_modes._compat.frames import source_name


def is_body(gm: fx.GraphModule) -> bool:
    """Whether a graph of the compilation in progress is run by another one, which the pass will get after it."""
    output = _output()
    return output is not None and any(body.graph is gm.graph for body in _bodies(output))


def provenance() -> Iterator[str]:
    """What a rewrite depends on and the text of the graph that is being compiled leaves out: whose nodes are whose."""
    output = _output()
    if output is None:
        return
    for graph in (output.graph, *(body.graph for body in _bodies(output))):
        for node in graph.nodes:
            if node.op == "placeholder":
                yield source_name(node)
            elif node.op == "call_function":
                yield f"{node.name} {node.meta.get('custom')}"
                for path, kind in (node.meta.get("nn_module_stack") or {}).values():
                    yield f"{path} {_lineage(kind)}"
        yield "end"


@contextlib.contextmanager
def as_in_backends() -> Iterator[None]:
    """The dispatcher as it is when Dynamo calls a backend; Inductor has switched Python kernels on."""
    with torch._C._DisablePythonDispatcher():
        yield


@functools.cache
def _lineage(kind: Any) -> str:
    """A class, or the name of one, with its bases, by which torch's own modules are told from others."""
    return " ".join(f"{base.__module__}.{base.__qualname__}" for base in getattr(kind, "__mro__", ())) or str(kind)


def _output() -> OutputGraph | None:
    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:
        return None


def _bodies(output: OutputGraph) -> Iterator[fx.GraphModule]:
    for held in output.nn_modules.values():
        if isinstance(held, fx.GraphModule):
            yield from (body for body in held.modules() if isinstance(body, fx.GraphModule))
