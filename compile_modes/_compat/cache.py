"""What Dynamo keeps of finished compilations: wrappers around modules, and the cache of each function."""

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this very module go through ``torch.compile``: a wrapper, ``compile()``, or its ``forward``."""
    forward = vars(module).get("forward")
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )
