"""The network of test_precompiled.py, which its worker imports too."""

import torch
from torch import nn


def shifted(module, args, out):
    return out + 1


class Net(nn.Module):
    """Norm, dropout, tied and frozen weights, a tensor that is neither parameter nor buffer, nested results."""

    def __init__(self, p=0.5):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(p)
        self.head, self.again, self.frozen = nn.Linear(6, 3), nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
        self.again.weight = self.head.weight
        self.frozen.requires_grad_(False)
        self.act, self.config, self.listed = torch.relu, {"scale": 2.0}, [torch.ones(3)]
        self.hook = self.head.register_forward_hook(shifted)
        self.scale = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, image):
        hidden = self.drop(self.act(self.norm(self.conv(image))).mean((2, 3)))
        scores = (
            self.head(hidden) * self.scale
            + self.again(hidden)
            + self.frozen(hidden) * self.config["scale"]
            + self.listed[0]
        )
        return {"scores": scores + torch.tensor([0.5, 0.0, 1.0]), "pair": (hidden, None)}


def pictures(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
