"""train/eval mode in compiled and exported PyTorch models."""

from compile_modes.backend.mode_pass import ModePass
from compile_modes.errors import (
    ArchiveError,
    BindError,
    CallError,
    CaptureError,
    CompileModesError,
    ExportError,
    MissingLibraryError,
    ModeWarning,
    OptionError,
    OverrideError,
    PackageError,
    SampleError,
    TuningError,
    VerifyError,
    WarmupError,
)
from compile_modes.exported.baking import bake
from compile_modes.exported.comparing import VerifyReport
from compile_modes.exported.differing.diff import diff
from compile_modes.exported.differing.report import DiffReport
from compile_modes.exported.exporting import export
from compile_modes.exported.joining import bind
from compile_modes.exported.literals import restore_literals
from compile_modes.exported.saving import load, save
from compile_modes.exported.torchao import (
    allow_exported_model_train_eval,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from compile_modes.exported.verifying import verify
from compile_modes.forms.deploy.writes import invalidate
from compile_modes.graph.cumulative import exportable
from compile_modes.graph.explain import explain
from compile_modes.graph.finding import sites
from compile_modes.graph.rewrite import Report, set_mode
from compile_modes.graph.sites import Site
from compile_modes.package.loading import load_package
from compile_modes.package.packaged import Packaged
from compile_modes.package.packaging import package
from compile_modes.package.precompiled import Precompiled
from compile_modes.package.precompiling import load_precompiled, precompile
from compile_modes.sampling.sample import sample
from compile_modes.tuning.adapter_state import load_lora, lora_state_dict
from compile_modes.tuning.adapting import lora
from compile_modes.tuning.freezing import FreezeReport, freeze
from compile_modes.tuning.heads import replace_head
from compile_modes.tuning.merging import merge
from compile_modes.tuning.statistics import update_bn
from compile_modes.warming.background import Warmup
from compile_modes.warming.warmup import warmup

__version__ = "0.1.0"  # the only place; packaging reads it from here

__all__ = [
    "ArchiveError",
    "BindError",
    "CallError",
    "CaptureError",
    "CompileModesError",
    "DiffReport",
    "ExportError",
    "FreezeReport",
    "MissingLibraryError",
    "ModePass",
    "ModeWarning",
    "OptionError",
    "OverrideError",
    "PackageError",
    "Packaged",
    "Precompiled",
    "Report",
    "SampleError",
    "Site",
    "TuningError",
    "VerifyError",
    "VerifyReport",
    "Warmup",
    "WarmupError",
    "allow_exported_model_train_eval",
    "bake",
    "bind",
    "diff",
    "explain",
    "export",
    "exportable",
    "freeze",
    "invalidate",
    "load",
    "load_lora",
    "load_package",
    "load_precompiled",
    "lora",
    "lora_state_dict",
    "merge",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    "package",
    "precompile",
    "replace_head",
    "restore_literals",
    "sample",
    "save",
    "set_mode",
    "sites",
    "update_bn",
    "verify",
    "warmup",
]
