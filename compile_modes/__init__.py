"""train/eval mode in compiled and exported PyTorch models."""

from compile_modes.baking import bake
from compile_modes.binding import bind
from compile_modes.cumulative import exportable
from compile_modes.errors import (
    ArchiveError,
    BindError,
    CaptureError,
    CompileModesError,
    ExportError,
    ModeWarning,
    OptionError,
    OverrideError,
    WarmupError,
)
from compile_modes.exported import (
    allow_exported_model_train_eval,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from compile_modes.exporting import export
from compile_modes.listing import explain
from compile_modes.literals import restore_literals
from compile_modes.passes import ModePass
from compile_modes.rewrite import Report, set_mode
from compile_modes.saving import load, save
from compile_modes.sites import Site, sites
from compile_modes.warmup import warmup

__all__ = [
    "ArchiveError",
    "BindError",
    "CaptureError",
    "CompileModesError",
    "ExportError",
    "ModePass",
    "ModeWarning",
    "OptionError",
    "OverrideError",
    "Report",
    "Site",
    "WarmupError",
    "allow_exported_model_train_eval",
    "bake",
    "bind",
    "explain",
    "export",
    "exportable",
    "load",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "restore_literals",
    "save",
    "set_mode",
    "sites",
    "warmup",
]
