"""Mode vectors: the combinations of modes that a function is compiled for, against the room in Dynamo's cache."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from compile_modes import messages
from compile_modes._compat import frames
from compile_modes._compat.cache import Compilation, entry_id, evict, limits, uncount
from compile_modes.errors import ModeWarning


@dataclass(frozen=True)
class _Known:
    """What one entry of a cache was compiled for.

    Attributes:
        group: entries of other groups never serve the same calls: other options, or another kind of model.
        vector: the flags that it is guarded on.
    """

    group: Hashable
    vector: frozenset[tuple[str, bool]]


# By code object, then by the id of the compilation.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def make_room(options: Hashable, keep: int | None) -> ModeWarning | None:
    """Called within each compilation: drops entries of the function's cache, or says that it is full.

    With ``keep``, at most so many vectors remain, those used last and the one being compiled, each with at most
    ``recompile_limit`` entries, for shapes and grad modes; none of them counts as a recompilation for Dynamo, which
    would run the function in eager mode from its limit on. Without, nothing is changed.

    Args:
        options: what else a compilation depends on.
        keep: the option ``mode_vectors``.

    Returns:
        A warning, if the next new vector would run in eager mode; or None.
    """
    compilation = Compilation.current()
    if compilation is None:
        return None
    known: dict[str, _Known] = _known.setdefault(compilation.code, {})
    kinds = tuple(type(module) for root in frames.frame_modules() for module in root.modules())
    new = known[compilation.id] = _Known((options, kinds), compilation.flags())
    entries = compilation.entries()
    for gone in known.keys() - {compilation.id, *map(entry_id, entries)}:
        del known[gone]
    limit, accumulated = limits()
    if keep is None:
        return _says_full(compilation, known, sum(map(compilation.counts, entries)) + 1, limit)
    _drop(entries, known, new, keep, limit)
    if compilation.ordinal + 1 < accumulated:
        return None
    return messages.COMPILED_TOO_OFTEN.warning(function=_name(compilation), count=compilation.ordinal + 1)


def _drop(entries: list[Any], known: dict[str, _Known], new: _Known, keep: int, limit: int) -> None:
    """Evicts what is beyond ``keep`` vectors and ``limit`` entries per vector, and lets the rest not count."""
    room = {new.vector: limit - 1}
    for entry in entries:
        its = known.get(entry_id(entry))
        if its is None or its.group != new.group:
            continue
        if its.vector not in room and len(room) < keep:
            room[its.vector] = limit
        if room.get(its.vector, 0) > 0:
            room[its.vector] -= 1
            uncount(entry)
        else:
            evict(entry)


def _says_full(compilation: Compilation, known: dict[str, _Known], used: int, limit: int) -> ModeWarning | None:
    vectors = len({its.vector for its in known.values()})
    if used < limit or 2 * vectors <= used:  # shapes or other objects, not modes, fill the cache
        return None
    return messages.CACHE_FULL.warning(function=_name(compilation), count=vectors, limit=limit)


def _name(compilation: Compilation) -> str:
    code = compilation.code
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
