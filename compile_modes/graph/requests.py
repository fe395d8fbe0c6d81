"""What callers ask of modes: which owners, by globs of their names, and which mode. Validated, and nothing else."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from compile_modes.errors import OptionError, OverrideError

MODES = {"train": True, "eval": False}


def check_overrides(training: Any, overrides: Any, where: str = "overrides") -> dict[str, str]:
    """Validates the two arguments that ask for modes, here and as options of the backend."""
    if training is not None and not isinstance(training, bool):
        raise OptionError(f"training is {training!r}", remedy="pass True, False, or None to leave the modes alone")
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise OptionError(f"overrides is a {type(overrides).__name__}", remedy='pass {"layer4.*": "eval"}')
    for pattern, mode in overrides.items():
        if not isinstance(pattern, str):
            raise OptionError(f"{pattern!r} is not an owner glob", where=where, remedy='pass {"layer4.*": "eval"}')
        if not isinstance(mode, str) or mode not in MODES:
            raise OptionError(f"{mode!r} is not a mode", where=f"{where}[{pattern!r}]", remedy="use 'train' or 'eval'")
    return dict(overrides)


def check_probabilities(dropout_p: Any) -> dict[str, float]:
    """Validates ``{owner glob: probability}``, an argument of ``bind`` and an option of the backend."""
    if dropout_p is None:
        return {}
    if not isinstance(dropout_p, Mapping):
        raise OptionError(f"{dropout_p!r} is no mapping", where="dropout_p", remedy='pass {"layers.*.self_attn": 0.1}')
    for pattern, p in dropout_p.items():
        if not isinstance(pattern, str):
            raise OptionError(
                f"{pattern!r} is not an owner glob", where="dropout_p", remedy='pass {"*.self_attn": 0.1}'
            )
        if not isinstance(p, float | int) or not 0 <= p < 1:
            raise OptionError(
                f"{p!r} is no probability", where=f"dropout_p[{pattern!r}]", remedy="pass a number from 0 to below 1"
            )
    return dict(dropout_p)


def owner_matches(owner: str, pattern: str) -> bool:
    """Whether a glob names an owner, ``"layer4.*"`` all below ``layer4``; case matters."""
    return fnmatchcase(owner, pattern)


def no_match(pattern: str, owners: list[str], argument: str, kind: str = "mode-dependent") -> OverrideError:
    """The error for a pattern that names no owner, with the owners it may have meant."""
    near = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.4) or owners[:3]
    return OverrideError(
        f"the pattern {pattern!r} matches no {kind} site",
        where=f"{argument}[{pattern!r}]",
        remedy=f"owners here: {', '.join(repr(o) for o in near)}" if near else "this graph has no such site",
    )
