"""Modules whose train and eval programs differ in more, or less, than flags."""

import torch
import torch.nn.functional as F
from torch import nn

from nets import (
    Attention,
)  # fmt: skip


class Reuse(nn.Module):
    """Uses the input of a dropout after it: one value in eval, two in train."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        y = self.fc(x)
        return self.drop(y) * 2 + y


class LayerDrop(nn.Module):
    """Python decides in train how much runs; its attention dropout is known in both programs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(0.3), Attention(0.4)

    def forward(self, x):
        x = self.first(x)
        return x if self.training else self.second(x)


class Schedule(nn.Module):
    """Another probability, and another constant, in each mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.3 if self.training else 0.1) * torch.tensor(1.0 + self.training)


class AlwaysOn(nn.Module):
    """A dropout that eval has too, among others that only train has; two attentions of one owner."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(self.fc(x), 0.2)
        q = x[None]
        a, b = (F.scaled_dot_product_attention(q, q, q, dropout_p=p if self.training else 0.0)[0] for p in (0.1, 0.4))
        return F.dropout(a + b, 0.3).relu() if self.training else a + b + 1


class GaussianNoise(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training is self.mode else x


class OwnCounter(nn.BatchNorm1d):
    """Counts in both modes, or normalises with batch statistics in both."""

    def __init__(self, always_counts):
        super().__init__(4)
        self.always_counts = always_counts

    def forward(self, x):
        if self.training or self.always_counts:
            self.num_batches_tracked.add_(1)
        training = self.training or not self.always_counts
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.2, self.eps)


class InvertedBeside(nn.Module):
    """An inverted dropout and one that is always on in a submodule, constants of both modes, and other outputs."""

    class Inner(nn.Module):
        def forward(self, x):
            x = F.dropout(x, 0.4, not self.training)
            if self.training:
                x = F.dropout(x * torch.tensor([2.0, 3, 4, 5]), 0.2)
            return F.dropout(x + torch.tensor([1.0, 1, 2, 2]), 0.25)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = InvertedBeside.Inner()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        y = self.drop(self.inner(self.fc(x)))
        return (y, x.sum()) if self.training else y


class Weights(nn.Module):
    """Attention that returns its weights: the dropout node is there in train only."""

    def __init__(self, p=0.3):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=p, batch_first=True)

    def forward(self, x):
        out, weights = self.attention(x, x, x)
        return out, weights
