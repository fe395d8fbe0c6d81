"""train/eval mode in compiled and exported PyTorch models."""

from compile_modes.binding import bake, bind
from compile_modes.errors import (
    BindError,
    CaptureError,
    CompileModesError,
    ModeWarning,
    OptionError,
    OverrideError,
)
from compile_modes.rewrite import Report, set_mode
from compile_modes.sites import Site, explain, sites

__all__ = [
    "BindError",
    "CaptureError",
    "CompileModesError",
    "ModeWarning",
    "OptionError",
    "OverrideError",
    "Report",
    "Site",
    "bake",
    "bind",
    "explain",
    "set_mode",
    "sites",
]
