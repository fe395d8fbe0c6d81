"""The call that ``module.compile()`` leaves on a module, put aside and back; and batch sizes that may vary.

Checked on torch 2.14.1 and 2.15.0: ``Module.compile`` keeps its compiled call in ``_compiled_call_impl``, which
``Module.__call__`` prefers; pickling and ``copy.deepcopy`` leave it out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

Call = Callable[..., Any]


def is_wrapper(module: object) -> bool:
    """Whether it is what ``torch.compile(module)`` returns, which has another class and signature than the module."""
    return isinstance(module, OptimizedModule)


def intercept(module: nn.Module, before: Callable[[nn.Module, Call, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Calls ``before(module, call, args, kwargs)`` in the place of each compiled call; ``call`` is the compiled one.

    A forward pre-hook would not do: ``module.compile()`` compiles the hooks with the module.
    """
    call: Call = module._compiled_call_impl  # type: ignore[assignment]

    @torch.compiler.disable(recursive=False)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return before(module, call, args, kwargs)

    put_back(module, intercepted)


def put_back(module: nn.Module, call: Call | None) -> None:
    """Makes ``call`` the compiled call of a module; None: it has none any more."""
    module._compiled_call_impl = call


def compiled_call(module: nn.Module) -> Call | None:
    """What ``module.compile()`` has left; None if it wasn't compiled in place."""
    return module._compiled_call_impl


def may_vary(tensor: torch.Tensor) -> None:
    """Asks for code that takes any first size of at least two; where a graph can't have that, it keeps the size."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
