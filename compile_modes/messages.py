"""What is said to the user."""

import warnings
from typing import Any

from compile_modes.errors import ModeWarning

WARNED: set[Any] = set()


def warn_once(text: str, *about: Any) -> None:
    """A ModeWarning that this process has not seen before, or not about the same things."""
    if (text, *about) not in WARNED:
        WARNED.add((text, *about))
        warnings.warn(text, ModeWarning, stacklevel=3)
