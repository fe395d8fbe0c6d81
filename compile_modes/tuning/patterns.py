"""Globs of layers, modules and parameters: checked, matched, and near matches offered for those that match nothing."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.graph.requests import owner_matches


def globs(patterns: Any, where: str) -> list[str]:
    """What an argument of globs says, as a list; one string is one glob.

    Raises:
        OptionError: it is something else.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, Iterable):
        raise messages.NOT_GLOBS.error(patterns=patterns, where=where)
    listed = list(listed)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise messages.NOT_GLOBS.error(patterns=patterns, where=where)
    return listed


def matched(patterns: Sequence[str], names: Iterable[str], where: str, kind: str) -> list[str]:
    """The names that globs match, in their order.

    Args:
        patterns: the globs, each of which has to match something.
        names: what there is.
        where: the argument, for the error.
        kind: what the names are of, for the error.

    Raises:
        TuningError: a pattern matches nothing; near matches are named.
    """
    names = list(dict.fromkeys(names))
    for pattern in patterns:
        if not any(owner_matches(name, pattern) for name in names):
            raise messages.MATCHES_NOTHING.error(pattern=pattern, where=where, kind=kind, near=near(pattern, names))
    return [name for name in names if any(owner_matches(name, pattern) for pattern in patterns)]


def near(asked: str, names: Iterable[str]) -> str:
    """What someone may have meant, in words: near matches, or what there is."""
    names = list(dict.fromkeys(names))
    ending = [name for name in names if name.rpartition(".")[2] == asked]
    if ending:  # PEFT takes the end of a name for all of it
        return f"a glob is matched with whole names: '*.{asked}' matches {few(map(repr, ending))}"
    found = difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    if found:
        return f"did you mean {', '.join(map(repr, found))}?"
    return f"names here: {few(map(repr, names))}" if names else "there are none here"
