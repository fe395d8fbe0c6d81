"""Which sizes Dynamo has seen change, and so takes for dynamic, carried to another process.

Dynamo makes a size dynamic when it meets a second value of it, and remembers that by the code that it has traced. A
process that has not met both compiles another graph. Checked on torch 2.14.1 and 2.15.0.
"""

from typing import Any

from torch import fx, nn
from torch._dynamo import pgo


def seen(module: nn.Module) -> dict[str, Any]:
    """What this process remembers, in a form that pickle takes.

    Args:
        module: its exported modules, whose code has another name in each process, are known by their place in it.
    """
    known: dict[Any, Any] = dict(pgo.get_code_state())
    generated = {name: known[code] for name, code in _generated(module) if code in known}
    return {"codes": known, "generated": generated}


def remember(found: dict[str, Any], module: nn.Module) -> None:
    """Has this process know what another has :func:`seen`."""
    known: Any = pgo.get_code_state()
    known.update(found["codes"])
    known.update({code: found["generated"][name] for name, code in _generated(module) if name in found["generated"]})


def _generated(module: nn.Module) -> list[tuple[str, Any]]:
    parts = module.named_modules(remove_duplicate=False)
    return [(n, pgo.CodeId.make(type(part).forward.__code__)) for n, part in parts if isinstance(part, fx.GraphModule)]
