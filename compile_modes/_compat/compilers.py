"""With what settings a module is compiled, to compile something else alike.

Checked on torch 2.14.1 and 2.15.0: an OptimizedModule holds the context that made it; the function that
``nn.Module.compile`` puts into a module closes over it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def compiler_of(module: nn.Module, dropped: Sequence[str]) -> Compiler | None:
    """What compiles a function as a module is compiled; None if it isn't, or by something of which that isn't known.

    Args:
        module: an OptimizedModule, or a module compiled in place.
        dropped: names in ``options=`` that are left out.
    """
    context = _context(module)
    if context is None:
        return None
    wrapper: Any = context.callback
    while hasattr(wrapper, "_torchdynamo_orig_backend"):
        wrapper = wrapper._torchdynamo_orig_backend
    if not isinstance(wrapper, torch._TorchCompileWrapper):
        return context  # type: ignore[no-any-return]
    settings = dict(wrapper.kwargs)
    options = {k: v for k, v in dict(settings.get("options") or {}).items() if k not in dropped}
    backend, mode = wrapper.compiler_fn, settings.get("mode")
    return lambda function: torch.compile(function, backend=backend, mode=mode, options=options or None, dynamic=False)


def _context(module: nn.Module) -> Any:
    if isinstance(module, OptimizedModule):
        return module.dynamo_ctx
    compiled: Any = module._compiled_call_impl
    cells = getattr(compiled, "__closure__", None) or ()
    return next((c.cell_contents for c in cells if isinstance(c.cell_contents, _TorchDynamoContext)), None)
