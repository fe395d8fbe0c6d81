"""Whose ``forward`` has run a node: the path and the class of a module, from the node's ``nn_module_stack``."""

import functools
import re
import sys

from torch import fx, nn
from torch.export.unflatten import InterpreterModule

from compile_modes import _compat


def join(prefix: str, name: str) -> str:
    """A path below another one."""
    return f"{prefix}.{name}" if prefix else name


@functools.lru_cache(maxsize=1 << 16)
def canonical(path: str) -> str:
    """A module path without export's call indices: the second call of ``bn`` is recorded as ``bn@1``."""
    return re.sub(r"@\d+(?=\.|$)", "", path)


@functools.lru_cache(maxsize=1 << 16)
def dynamo_path(source: str) -> str:
    """A path as ``named_modules()`` writes it, from the way Dynamo writes it.

    >>> dynamo_path("L['self']._modules['b']._modules['0']._buffers['running_mean']")
    'b.0.running_mean'
    >>> dynamo_path("L['self'].seq.1")
    'seq.1'
    """
    path = re.sub(r"^[LG]\[[^\]]*\]", "", source)
    path = re.sub(r"\._(?:modules|buffers|parameters)\['([^']*)'\]", r".\1", path)
    return path.lstrip(".")


def module_path(node: fx.Node) -> str:
    """The path of the submodule whose ``forward`` ran ``node``; ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    return canonical(dynamo_path(next(reversed(stack.values()))[0])) if stack else ""


def module_classes(node: fx.Node) -> list[type[nn.Module] | None]:
    """The classes of the modules around a node, the innermost last; None where it is not known in this process."""
    return [_class(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values()]


def module_class(node: fx.Node) -> type[nn.Module] | None:
    """The class of the submodule whose ``forward`` ran ``node``; None if it is not known."""
    stack = node.meta.get("nn_module_stack")
    return _class(next(reversed(stack.values()))[1]) if stack else None


def _class(kind: type | str) -> type[nn.Module] | None:
    if isinstance(kind, str):  # export writes the qualified name
        module, _, name = kind.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
    else:
        found = kind
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def is_observing(node: fx.Node) -> bool:
    """Whether one of the modules around a node is an observer or a fake quantizer of torch or torchao.

    These write their statistics whatever their mode; what stops them is a switch of their own.
    """
    kinds = (node.meta.get("nn_module_stack") or {}).values()
    names = [kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}" for _, kind in kinds]
    return any(name.startswith(("torch.ao.quantization.", "torchao.quantization.")) for name in names)


def is_batch_norm(node: fx.Node) -> bool | None:
    """Whether that submodule is one of torch's batch norms, or derived from one; None if its class is not known.

    Captured from an unflattened module, a node has that module's classes, which don't say what they were before export.
    """
    kind = module_class(node)
    return None if kind is None or issubclass(kind, InterpreterModule) else issubclass(kind, _compat.BATCH_NORM)
