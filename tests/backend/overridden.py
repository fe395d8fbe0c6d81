"""Modules whose options have something to reach, or to miss."""

import torch
import torch.nn.functional as F
from torch import nn

from nets import Recurrent

VECTOR = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


STEPS = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(5))
SEQUENCE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x


class Behind(nn.Module):
    """Recurrent layers behind something that Dynamo does compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.relu(x))


class Projected(nn.Module):
    """Attention as models of their own write it: the probability stands in an attribute of the module."""

    def __init__(self, p: float, fused: bool = True) -> None:
        super().__init__()
        self.p, self.fused = p, fused
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            out = F.dropout((q @ k.mT).softmax(-1), p, self.training) @ v
        return out.transpose(1, 2).flatten(2)
