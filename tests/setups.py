"""What many tests start from: a table of nets, and a net exported, bound or compiled."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import compile_modes as cm
from nets import (
    IMAGE,
    SEQUENCE,
    TOKENS,
    VECTORS,
    Activations,
    Attention,
    ConvNet,
    Norms,
    Parent,
    Recurrent,
    Regions,
    UnusedNorm,
    UserCounter,
)  # fmt: skip

STARTS = pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
NETS = {
    "conv": (ConvNet, IMAGE),
    "activations": (Activations, torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))),
    "norms": (Norms, torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(6))),
    "recurrent": (Recurrent, SEQUENCE),
    "regions": (Regions, IMAGE),
    "attention": (Attention, TOKENS),
    "unused": (UnusedNorm, VECTORS),
    "counter": (UserCounter, VECTORS),
}


def nets(*names: str) -> list[Any]:
    """Parameters ``build`` and ``x`` of a test: those of the table that are named, or all."""
    return [pytest.param(*NETS[name], id=name) for name in names or NETS]


def compile_(module: nn.Module, **options: Any) -> Any:
    """Compiled under the backend, with its options."""
    return torch.compile(module, backend="pt2e_modes", options=options or None)


def compiled_as(kind: str, model: nn.Module, x: Any) -> Any:
    """Compiled in one of the ways: "bound", "in place", "forward", "nested"; or "stock", without our backend."""
    if kind == "bound":
        model = cm.bind(torch.export.export(model, (x,)))
    if kind == "in place":
        model.compile(backend="pt2e_modes")
        return model
    if kind == "forward":
        model.forward = torch.compile(model.forward, backend="pt2e_modes")  # type: ignore[method-assign]
        return model
    call = torch.compile(model, backend="inductor" if kind == "stock" else "pt2e_modes")
    return Parent(call) if kind == "nested" else call


def export(model: nn.Module, *args: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model, args)


def bound(model: nn.Module, *args: Any, start: bool = True, **options: Any) -> Any:
    """The bound export of a copy, in train mode or in eval mode."""
    return cm.bind(torch.export.export(copy.deepcopy(model).train(start), args, **options))


def twin(model: nn.Module, start: bool, *args: Any) -> tuple[nn.Module, Any]:
    """An eager model, and the bound export of a copy with the same state."""
    return model, bound(model, *args, start=start)
