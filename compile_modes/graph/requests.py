"""What callers ask of modes: which owners, by globs of their names, and which mode. Validated, and nothing else."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from compile_modes import messages
from compile_modes.errors import OverrideError

MODES = {"train": True, "eval": False}


def check_overrides(training: Any, overrides: Any, where: str = "overrides") -> dict[str, str]:
    """Validates the two arguments that ask for modes, here and as options of the backend."""
    if training is not None and not isinstance(training, bool):
        raise messages.NOT_TRAINING.error(training=training)
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise messages.NOT_OVERRIDES.error(kind=type(overrides).__name__)
    for pattern, mode in overrides.items():
        if not isinstance(pattern, str):
            raise messages.NOT_A_GLOB.error(pattern=pattern, where=where, example='{"layer4.*": "eval"}')
        if not isinstance(mode, str) or mode not in MODES:
            raise messages.NOT_A_MODE.error(mode=mode, where=where, pattern=pattern)
    return dict(overrides)


def check_probabilities(dropout_p: Any) -> dict[str, float]:
    """Validates ``{owner glob: probability}``, an argument of ``bind`` and an option of the backend."""
    if dropout_p is None:
        return {}
    if not isinstance(dropout_p, Mapping):
        raise messages.NOT_A_MAPPING.error(dropout_p=dropout_p)
    for pattern, p in dropout_p.items():
        if not isinstance(pattern, str):
            raise messages.NOT_A_GLOB.error(pattern=pattern, where="dropout_p", example='{"*.self_attn": 0.1}')
        if not isinstance(p, float | int) or not 0 <= p < 1:
            raise messages.NOT_A_PROBABILITY.error(p=p, pattern=pattern)
    return dict(dropout_p)


def owner_matches(owner: str, pattern: str) -> bool:
    """Whether a glob names an owner, ``"layer4.*"`` all below ``layer4``; case matters."""
    return fnmatchcase(owner, pattern)


def no_match(pattern: str, owners: list[str], argument: str, kind: str = "mode-dependent") -> OverrideError:
    """The error for a pattern that names no owner, with the owners it may have meant."""
    near = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.4) or owners[:3]
    if not near:
        return messages.NO_OWNERS.error(pattern=pattern, kind=kind, argument=argument)
    named = ", ".join(repr(owner) for owner in near)
    return messages.NO_SUCH_OWNER.error(pattern=pattern, kind=kind, argument=argument, owners=named)
