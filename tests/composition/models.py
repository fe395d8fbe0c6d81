"""What the tests of this folder train, in the forms that a user may have it in."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compile_modes as cm


class Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-2, momentum=0.2)
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.bn(self.conv(x))))


class Net(nn.Module):
    """Without kinks, and without a bias whose gradient is zero but for rounding: so any optimizer will do."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = Block(3, 4), Block(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.fc(self.block2(self.block1(x)).mean((2, 3))), 0.15, self.training)


class TwoPrograms(Net):
    """Decides by its mode in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if self.training else y


X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))


KINDS = pytest.mark.parametrize(
    "kind",
    ["bound", pytest.param("eager", marks=pytest.mark.slow), pytest.param("dual", marks=pytest.mark.slow)],
)


def bound(model: nn.Module, dynamic_shapes=None) -> nn.Module:
    return cm.bind(torch.export.export(model, (X,), dynamic_shapes=dynamic_shapes))


def dual(model: nn.Module, dynamic_shapes=None) -> nn.Module:
    return cm.export(model, (X,), dynamic_shapes=dynamic_shapes)


def make(kind: str, dynamic_shapes=None) -> tuple[nn.Module, nn.Module]:
    """An eager model, and one like it in the form that ``kind`` says."""
    reference = TwoPrograms() if kind == "dual" else Net()
    forms: dict[str, Callable[..., nn.Module]] = {"eager": lambda m, _: m, "bound": bound, "dual": dual}
    return reference, forms[kind](copy.deepcopy(reference), dynamic_shapes)
