"""Trains a small classifier of the digits 0 to 4, and leaves nothing of it but an exported program.

This is the part that a user of a published .pt2 file never sees.
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.relu(self.bn(self.conv(x))))


class Classifier(nn.Module):
    """Digits of 8 x 8 pixels in, logits of 5 classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = Block(1, 16), Block(16, 32)
        self.hidden, self.drop, self.fc = nn.Linear(32 * 4, 64), nn.Dropout(0.2), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.block1(x), 2)
        x = F.max_pool2d(self.block2(x), 2)
        return self.fc(self.drop(torch.relu(self.hidden(x.flatten(1)))))


def main(path: str) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[labels < 5], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[labels < 5])
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    batch_size = {0: torch.export.Dim("batch", min=1, max=4096)}
    torch.export.save(torch.export.export(model.eval(), (x[:8],), dynamic_shapes=(batch_size,)), path)


if __name__ == "__main__":
    main(sys.argv[1])
