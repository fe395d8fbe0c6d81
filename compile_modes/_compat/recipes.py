"""How a module is compiled, as arguments of ``torch.compile``, so that another process can do the same.

Checked on torch 2.14.1 and 2.15.0.
"""

from typing import Any

import torch
from torch import nn

from compile_modes._compat.copies import compiler_of, context_of

_COMPILED = torch._dynamo.OptimizedModule


def is_wrapper(module: Any) -> bool:
    """Whether something is what ``torch.compile(module)`` returned."""
    return isinstance(module, _COMPILED)


def inside(wrapper: Any) -> nn.Module:
    """The module in a wrapper."""
    module: nn.Module = wrapper._orig_mod
    return module


def of_wrapper(wrapper: Any) -> dict[str, Any]:
    """The arguments of ``torch.compile`` that a wrapper was made with."""
    return _recipe(wrapper.dynamo_ctx)


def in_place(module: nn.Module) -> dict[str, Any] | None:
    """The arguments of ``module.compile()``; None if the module wasn't compiled so."""
    context = context_of(module._compiled_call_impl)
    return None if context is None else _recipe(context)


def of_function(function: Any) -> dict[str, Any] | None:
    """The arguments with which a method was compiled; None if it wasn't."""
    if not hasattr(function, "_torchdynamo_orig_callable"):
        return None
    context = context_of(function)
    return None if context is None else _recipe(context)


def _recipe(context: Any) -> dict[str, Any]:
    compiler = compiler_of(context.callback)
    how: dict[str, Any] = {"fullgraph": context.fullgraph, "dynamic": compiler.dynamic}
    if isinstance(compiler, torch._TorchCompileInductorWrapper):  # its config holds what mode and options ask for
        return how | {"backend": "inductor", "options": dict(compiler.config) or None}
    return how | {"backend": compiler.compiler_fn, **compiler.kwargs}
