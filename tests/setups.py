"""What many tests start from: a module compiled, or exported and bound."""

from typing import Any

import torch
from torch import nn


def compile_(module: nn.Module, **options: Any) -> Any:
    """Compiled under the backend, with its options."""
    return torch.compile(module, backend="pt2e_modes", options=options or None)
