"""Models to package, and the loss that they are trained with."""

import torch
import torch.nn.functional as F
from torch import nn

BATCH = torch.export.Dim("batch", min=1, max=64)


class Cnn(nn.Module):
    """Batch norm, dropout, a tied and a frozen weight, one that nothing uses, and outputs in a dict."""

    def __init__(self, p=0.0):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(p), nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)
        self.tied = self.head.weight
        self.frozen = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]), requires_grad=False)

    def forward(self, image):
        features = self.drop(torch.relu(self.bn(self.conv(image))).mean((2, 3)))
        return {"logits": self.head(features) * self.frozen, "features": features, "count": 3, "nothing": None}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0))
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return {"logits": self.head(self.gru(self.mlp(x))[0][:, -1])}


class Small(nn.Module):
    """What goes wrong by hand: vectors of few elements, a constant, an alias, a dropout, a buffer that isn't saved."""

    def __init__(self, p=0.5):
        super().__init__()
        self.first, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(p)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("part", self.gain.detach()[:2])
        self.register_buffer("offset", torch.zeros(4), persistent=False)

    def forward(self, x):
        scaled = self.drop(self.bn(self.first(x)) * self.gain + self.offset)
        return scaled + torch.tensor([1.0, 2.0, 3.0, 4.0]), self.part.sum()


def cross_entropy(outputs, target):
    return F.cross_entropy(outputs["logits"], target)


def squares(outputs, target):
    return (outputs[0] - target).square().mean()


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)
