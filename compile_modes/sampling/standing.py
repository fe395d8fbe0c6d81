"""Whether a module is still what it was: its submodules, their settings, parameters, buffers and hooks.

Values of parameters and buffers may change, and modes: graphs read the ones, and don't follow the others.
"""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_OURS = ("training", "_compiled_call_impl")


class Standing:
    """What a module was like.

    Objects are known by their identity; those that die are no longer what they were.
    """

    def __init__(self, module: nn.Module) -> None:
        self._alive: list[weakref.ref[Any]] = []
        self._marks = list(_marks(module, self._alive))

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still like that."""
        return all(ref() is not None for ref in self._alive) and self._marks == list(_marks(module, []))


def _marks(module: nn.Module, alive: list["weakref.ref[Any]"]) -> Iterator[Any]:
    for name, submodule in module.named_modules(remove_duplicate=False):
        if submodule is not module:
            _watch(submodule, alive)
        yield name, type(submodule), id(submodule)
        for key, value in vars(submodule).items():
            if key not in _OURS and not (isinstance(value, dict) and not value):
                yield key, _mark(value, alive, 3)


def _mark(value: Any, alive: list["weakref.ref[Any]"], depth: int) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value if value == value else "nan"
    if isinstance(value, Tensor):
        _watch(value, alive)
        return id(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return type(value), len(value), tuple(_mark(item, alive, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return type(value), tuple((_mark(k, alive, 0), _mark(v, alive, depth - 1)) for k, v in value.items())
    _watch(value, alive)
    return type(value), id(value)


def _watch(value: Any, alive: list["weakref.ref[Any]"]) -> None:
    try:
        alive.append(weakref.ref(value))
    except TypeError:
        return  # known by its number alone, as a method that is bound anew each time can't be
