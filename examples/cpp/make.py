"""``python make.py FOLDER``: a package of a small CNN, and batches to train it with from C++."""

import sys
from pathlib import Path

import torch
from torch import nn

import compile_modes as cm


def model():
    """A CNN with batch norm, always with the same weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0)]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def main(folder):
    """Writes ``model.pt2`` and ``batches.pt``."""
    inputs, targets = torch.randn(20, 16, 3, 8, 8), torch.randint(0, 4, (20, 16))
    cm.package(model(), (inputs[0],), folder / "model.pt2", loss=nn.functional.cross_entropy, targets=(targets[0],))
    torch.save((inputs, targets), folder / "batches.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
