"""What code for any size of the batch compiles again for; docs/trainers.md says so, and has to change with torch."""

import pytest
import torch
from torch import nn

from graphs import graphs_compiled
from setups import compile_


def graphs_for(module, *sizes, shape):
    torch._dynamo.reset()  # what other modules of the class have had compiled
    compiled, before = compile_(module), graphs_compiled()
    for size in sizes:
        x = torch.randn(size, *shape)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        compiled(x)
    return graphs_compiled() - before


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 4), (4,)),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)), (3, 4, 4)),
    ],
    ids=["linear", "norm"],
)
def test_a_smaller_last_batch_compiles_nothing(module, shape, no_inductor):
    assert graphs_for(module, 32, 20, 5, 2, shape=shape) == 1


def test_convolutions_compile_once_more_below_a_batch_of_16(no_inductor):
    """torch chooses between kernels of oneDNN by that, while it traces."""
    assert graphs_for(nn.Conv2d(3, 4, 3), 32, 16, 20, shape=(3, 6, 6)) == 1
    assert graphs_for(nn.Conv2d(3, 4, 3), 8, 5, 2, shape=(3, 6, 6)) == 1
    assert graphs_for(nn.Conv2d(3, 4, 3), 32, 5, 20, 2, shape=(3, 6, 6)) == 2
