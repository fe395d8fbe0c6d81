"""The models of first_eval.py: in a file of their own, for a child process can't import what stands in ``__main__``."""

import itertools

import torch
from torch import Tensor, nn


class Cnn(nn.Module):
    """Three blocks of convolution, norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        blocks = [
            [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2)]
            for a, b in itertools.pairwise(widths)
        ]
        self.features = nn.Sequential(*[layer for block in blocks for layer in block])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Bert(nn.Module):
    """Four layers of transformers' BERT, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=1000
        )
        self.inner = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).last_hidden_state


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model, and what it is called with."""
    torch.manual_seed(0)
    if name == "cnn":
        return Cnn(), torch.randn(16, 3, 32, 32)
    if name == "bert4":
        return Bert(), torch.randint(0, 1000, (8, 64))
    torchvision = __import__("torchvision")
    return torchvision.models.get_model(name), torch.randn(8, 3, 128, 128)
