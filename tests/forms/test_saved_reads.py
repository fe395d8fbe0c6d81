"""Gradients through what a model computes from a buffer before the same graph updates it, as QAT does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from setups import compile_

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


class Scaled(nn.Module):
    """A convolution in the scale of the batch norm behind it, which torchao's QAT puts in the place of the two."""

    def __init__(self, read):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4, momentum=0.5)
        self.bn.running_var.fill_(3.0)
        self.read = read

    def forward(self, x):
        scale = self.read(self.bn)
        y = F.conv2d(self.first(x), self.conv.weight * scale.reshape(-1, 1, 1, 1)) / scale.reshape(1, -1, 1, 1)
        return self.bn(y)


class Counting(nn.Module):
    """Multiplies by a count that the graph itself advances."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 4), nn.BatchNorm2d(3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1.0)
        return self.fc(self.bn(x)) * self.steps.sqrt()


MODELS = [
    pytest.param(lambda: Scaled(lambda bn: bn.weight / torch.sqrt(bn.running_var + 1e-5)), id="as-torchao"),
    pytest.param(lambda: Scaled(lambda bn: bn.running_var.reshape(2, 2).T.flatten().exp()), id="through-a-view"),
    pytest.param(Counting, id="counter"),
]


def gradients(module, call, steps=2):
    for _ in range(steps):
        module.zero_grad()
        call(X).square().mul(torch.linspace(-1, 1, X.shape[-1] - 2)).mean().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def check(build, compiled_first=None):
    reference = build()
    module = copy.deepcopy(reference)
    if compiled_first is not None:
        other = copy.deepcopy(reference)
        gradients(other, torch.compile(other, backend=compiled_first))
        torch._dynamo.reset()
    ours, theirs = gradients(module, compile_(module)), gradients(reference, reference)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, expected in reference.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("build", MODELS)
def test_gradients_are_those_of_eager(build, no_inductor):
    check(build)


@pytest.mark.slow
def test_gradients_are_those_of_eager_where_stock_has_filled_the_cache():
    check(MODELS[0].values[0], compiled_first="inductor")
