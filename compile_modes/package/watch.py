"""What compiled code takes for granted of a module's Python: classes, numbers, strings, hooks; compared at calls."""

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import fx, nn

from compile_modes import messages

_OWN = vars(nn.Module()).keys()  # what torch itself keeps in every module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BACKWARD = _HOOKS[2:]
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class _Watched:
    """One submodule: its attributes that are plain values, how many hooks it has, and how to get both."""

    name: str
    module: nn.Module
    names: tuple[str, ...]
    get: Any
    values: Any
    hooks: tuple[dict[Any, Any], ...]
    counts: tuple[int, ...]


class Watch:
    """The present state of a module's Python.

    Attributes that are numbers, strings, or tuples of these count, whatever reads them: which of them code depends on
    is something that only running it would tell.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._watched = [_watched(name, one) for name, one in module.named_modules()]

    def check(self) -> None:
        """Compares the module with what it was.

        Raises:
            PackageError: an attribute has another value, or a hook was added or removed.
        """
        for one in self._watched:
            if one.names and _values(one) != one.values:
                now = vars(one.module)
                old = dict(zip(one.names, one.values if len(one.names) > 1 else (one.values,), strict=True))
                key = next(key for key in one.names if key not in now or now[key] != old[key])
                said = "is gone" if key not in now else f"is {_short(now[key])}"
                raise messages.ATTRIBUTE_CHANGED.error(now=said, then=_short(old[key]), name=_path(one.name, key))
            if tuple(map(len, one.hooks)) != one.counts:
                raise messages.HOOKS_CHANGED.error(name=one.name or "the root")

    def backward_hooks(self) -> list[str]:
        """The submodules with hooks on their gradients, which a program can't have."""
        return [one.name or "the root" for one in self._watched if any(getattr(one.module, name) for name in _BACKWARD)]

    def described(self) -> dict[str, list[Any]]:
        """All of it in JSON, to be compared with that of a module in another process."""
        return {
            one.name: [
                type(one.module).__qualname__,
                _source(one.module),
                {key: _short(vars(one.module)[key]) for key in one.names if key != "_code"},
                list(one.counts),
            ]
            for one in self._watched
        }


def difference(then: dict[str, list[Any]], now: dict[str, list[Any]]) -> str:
    """The first difference between two descriptions; empty if there is none."""
    for name in (*then, *now):
        shown = repr(name) if name else "the root"
        if name not in then or name not in now:
            return f"submodule {shown} is {'new' if name in now else 'gone'}"
        (kind, source, values, hooks), (kind_now, source_now, values_now, hooks_now) = then[name], now[name]
        if kind != kind_now:
            return f"{shown} is a {kind_now}, and was a {kind}"
        if source != source_now:
            return f"the code of {shown}, a {kind}, has changed"
        for key in (*values, *values_now):
            if values.get(key) != values_now.get(key):
                return f"{key} of {shown} is {values_now.get(key)}, and was {values.get(key)}"
        if hooks != hooks_now:
            return f"the hooks of {shown} are others"
    return ""


def _watched(name: str, module: nn.Module) -> _Watched:
    names = tuple(key for key, value in vars(module).items() if _is_theirs(module, key) and _is_plain(value))
    get = itemgetter(*names) if names else None
    values = get(vars(module)) if get is not None else ()
    hooks = tuple(getattr(module, hook) for hook in _HOOKS)
    return _Watched(name, module, names, get, values, hooks, tuple(map(len, hooks)))


def _values(one: _Watched) -> Any:
    try:
        return one.get(vars(one.module))
    except KeyError:
        return None


def _is_theirs(module: nn.Module, key: str) -> bool:
    """Whether an attribute is more than torch's own bookkeeping. The code of a graph says what it computes."""
    if isinstance(module, fx.GraphModule) and key.startswith("_"):
        return key == "_code"
    return key not in _OWN


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else isinstance(value, _PLAIN)


def _source(module: nn.Module) -> str:
    """A digest of the code of a module's class, as far as Python has it; of a graph, of what that says."""
    return hashlib.sha256("\n".join(_sources(module)).encode()).hexdigest()


def _sources(module: nn.Module) -> Iterator[str]:
    if isinstance(module, fx.GraphModule):
        yield module.code
        return
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] == "torch" or kind is object:
            continue  # the release of torch is compared as such
        try:
            yield inspect.getsource(kind)
        except (OSError, TypeError):
            yield kind.__qualname__


def _path(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
