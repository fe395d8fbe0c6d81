"""A module whose body is run in one way or another: in a checkpoint, a region, or something that is kept as it came."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """A batch norm and a dropout, alone or as a body that ``inner`` runs in one way or another."""

    def __init__(self, inner: Callable[["Net", torch.Tensor], torch.Tensor], norm: bool = True) -> None:
        super().__init__()
        self.inner, self.norm = inner, norm
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4, eps=1e-3, momentum=0.03)
        self.drop, self.last = nn.Dropout(0.3), nn.Dropout(0.15)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return self.drop(self.bn(x) if self.norm else x)

    @torch.compiler.nested_compile_region
    def region(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.out(self.inner(self, x)))


def _save_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, _save_products)


def no_grad(net, x):
    with torch.no_grad():
        y = net.body(x)
    return y + net.fc(x)


CHECKPOINTS = {
    "checkpoint": lambda net, x: checkpoint(net.body, x, use_reentrant=False) + net.fc(x),
    "reentrant": lambda net, x: checkpoint(net.body, net.out(x), use_reentrant=True),
    "selective": lambda net, x: checkpoint(net.body, x, use_reentrant=False, context_fn=selective),
    "nested": lambda net, x: checkpoint(
        lambda y: checkpoint(net.body, y, use_reentrant=False) * 2, x, use_reentrant=False
    ),
    "without-grad": lambda net, x: no_grad(net, x) + checkpoint(net.body, x.sin(), use_reentrant=False),
}
