"""Whether a module is still what it was: its submodules, their settings, parameters, buffers and hooks.

Values of parameters and buffers may change, and modes: graphs read the ones, and don't follow the others.
"""

import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

_NUMBERS = frozenset({int, float, complex, bool})  # equal ones of two types are not the same
_PLAIN = (*_NUMBERS, str, bytes, type(None))
_CONTAINERS = frozenset({dict, OrderedDict, set})
_OURS = frozenset({"training", "_compiled_call_impl", "_modules"})  # the walk over submodules sees the last
_MISSING = object()

Watched = list["weakref.ref[Any]"]


class Standing:
    """What a module was like.

    Objects are known by their identity; those that die are no longer what they were.
    """

    def __init__(self, module: nn.Module) -> None:
        self._alive: Watched = []
        self._seen = [_Seen(name, one, self._alive) for name, one in module.named_modules(remove_duplicate=False)]
        _watch([submodule for submodule in module.modules() if submodule is not module], self._alive)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is still like that. It is asked before every pass, so it makes as little as it can."""
        if not all(ref() is not None for ref in self._alive):
            return False
        now = list(module.named_modules(remove_duplicate=False))
        seen = self._seen
        return len(now) == len(seen) and all(one.holds(*named) for one, named in zip(seen, now, strict=True))


class _Seen:
    """What one submodule was like.

    Empty containers, such as those of hooks, are as if they weren't there.
    """

    def __init__(self, name: str, module: nn.Module, alive: Watched) -> None:
        self._name, self._type, self._id = name, type(module), id(module)
        kept = {k: v for k, v in vars(module).items() if k not in _OURS and (type(v) not in _CONTAINERS or v)}
        self._plain = {key: value for key, value in kept.items() if type(value) in _PLAIN}
        self._marks = {key: _mark(value, alive, 3) for key, value in kept.items()}

    def holds(self, name: str, module: nn.Module) -> bool:
        if self._id != id(module) or self._type is not type(module) or self._name != name:
            return False
        plain, left = self._plain, len(self._marks)
        for key, value in vars(module).items():
            if type(value) in _CONTAINERS and not value:
                continue
            if plain.get(key, _MISSING) is not value:  # mostly it is: the very same number, or None
                if key in _OURS:
                    continue
                if self._marks.get(key, _MISSING) != _mark(value, None, 3):
                    return False
            left -= 1
        return not left


def _mark(value: Any, alive: Watched | None, depth: int) -> Any:
    kind = type(value)
    if kind in _NUMBERS:
        return kind, value if value == value else "nan"
    if isinstance(value, _PLAIN):
        return kind, value
    if isinstance(value, Tensor):
        _watch([value], alive)
        return id(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return kind, len(value), tuple([_mark(item, alive, depth - 1) for item in value])
    if isinstance(value, dict) and depth:
        return kind, [(_mark(k, alive, 0), _mark(v, alive, depth - 1)) for k, v in value.items()]
    _watch([value], alive)
    return kind, id(value)


def _watch(values: list[Any], alive: Watched | None) -> None:
    for value in values if alive is not None else ():
        try:
            alive.append(weakref.ref(value))  # type: ignore[union-attr]
        except TypeError:
            continue  # known by its number alone, as a method that is bound anew each time can't be
