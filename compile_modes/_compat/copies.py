"""Deep copies of compiled modules: torch's OptimizedModule hands its own copying to the module inside."""

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_COMPILED = torch._dynamo.OptimizedModule
_READS = _COMPILED.__getattr__.__code__  # by which the wrapper reads the inner module's attributes for its own


class Copying:
    """A ``__deepcopy__`` for the class of a module, of which a compiled module has a compiled copy.

    ``copy.deepcopy`` of an OptimizedModule finds this method of the module inside, and would return a copy of that one.
    Read through a wrapper, it copies the wrapper: the same compiler around a copy of the module.

    Args:
        inner: what copies the module itself, of the module and the memo.
    """

    def __init__(self, inner: Callable[[Any, dict[int, Any]], Any]) -> None:
        self.inner = inner

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module is None:
            return self
        reader = sys._getframe(1)
        if reader.f_code is _READS and isinstance(wrapper := reader.f_locals["self"], _COMPILED):
            return types.MethodType(_copy_compiled, wrapper)
        return types.MethodType(self.copy, module)

    def copy(self, module: nn.Module, memo: dict[int, Any]) -> Any:
        copied = self.inner(module, memo)
        context = context_of(module._compiled_call_impl)
        if context is not None:  # compiled in place, which copies of torch's forget
            copied._compiled_call_impl = context(copied._call_impl)
        return copied


def _copy_compiled(wrapper: Any, memo: dict[int, Any]) -> Any:
    # The context holds backend, mode, options and dynamic, and nothing of what was compiled or for whom.
    return wrapper.dynamo_ctx(copy.deepcopy(wrapper._orig_mod, memo))


def context_of(compiled: Any) -> Any:
    """The context of a function that ``torch.compile`` has returned; None if it is no such function."""
    while compiled is not None:
        code = getattr(compiled, "__code__", None)
        if code is not None and "self" in code.co_freevars and hasattr(compiled, "get_compiler_config"):
            return compiled.__closure__[code.co_freevars.index("self")].cell_contents
        compiled = getattr(compiled, "__wrapped__", None)
    return None


def compiler_of(callback: Any) -> Any:
    """What a context calls to compile, inside of what Dynamo has wrapped around it."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback


def copy_compiled(module: fx.GraphModule) -> None:
    """Gives a GraphModule, which has a class of its own, and all copies of it copies that are compiled as they are."""
    kind: Any = type(module)
    if not isinstance(vars(kind).get("__deepcopy__"), Copying):
        kind.__deepcopy__ = Copying(fx.GraphModule.__deepcopy__)
    if copy_compiled not in module._deepcopy_hooks:
        module._deepcopy_hooks.append(copy_compiled)
