"""The backend's options, validated, and told from Inductor's."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compile_modes import messages
from compile_modes.graph.requests import check_overrides, check_probabilities

OWN_OPTIONS = ("training", "overrides", "dropout_p", "mode_vectors", "tune", "freeze", "modes")


@dataclass(frozen=True)
class Options:
    """The backend's options, split into ours and Inductor's."""

    training: bool | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    dropout_p: Mapping[str, float] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode_vectors: int | None = None
    tune: bool = False
    freeze: bool | str = False
    modes: str | None = None

    @property
    def explicit(self) -> bool:
        """Whether modes are asked for that the module's flags don't say."""
        return self.training is not None or bool(self.overrides)

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | None) -> "Options":
        """Validates ``mode=`` and ``options=`` of ``torch.compile``; raises OptionError."""
        known_modes = list(torch._inductor.list_mode_options())
        if mode is not None and mode != "default" and mode not in known_modes:
            raise messages.NOT_A_COMPILE_MODE.error(mode=mode, suggestion=_near(mode, known_modes))
        given = dict(options or {})
        training = given.pop("training", None)
        overrides = check_overrides(training, given.pop("overrides", None))
        dropout_p = check_probabilities(given.pop("dropout_p", None))
        vectors = given.pop("mode_vectors", None)
        if vectors is not None and (type(vectors) is not int or vectors < 1):
            raise messages.NOT_A_NUMBER.error(vectors=vectors)
        tune = given.pop("tune", False)
        if type(tune) is not bool:
            raise messages.NOT_A_SWITCH.error(name="tune", value=tune)
        freeze = given.pop("freeze", False)
        if freeze not in (False, "auto", "strict") or type(freeze) not in (bool, str):
            raise messages.NOT_A_FREEZE.error(freeze=freeze)
        modes = given.pop("modes", None)
        if modes not in (None, "data"):
            raise messages.NOT_DATA.error(modes=modes)
        asked = {"training": training is not None, "overrides": bool(overrides), "freeze": bool(freeze)}
        if modes and any(asked.values()):
            raise messages.DATA_AND_ASKED.error(asked=next(name for name in asked if asked[name]))
        known = torch._inductor.list_options()
        for key in given:
            if key.replace("-", "_") not in known:
                raise messages.UNKNOWN_OPTION.error(key=key, suggestion=_near(key, [*OWN_OPTIONS, *known]))
        return cls(training, overrides, dropout_p, given, vectors, tune, freeze, modes)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {', '.join(known[:6])}, ..."
