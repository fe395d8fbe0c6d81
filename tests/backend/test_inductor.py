"""End to end through Inductor: what the README promises, in full."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, ConvNet, Parent
from oracle import agrees
from setups import nets

KINDS = ["eager", "bound-train", "bound-eval"]


# In larger graphs, Inductor of torch 2.11 draws in another order than eager despite fallback_random. Stock Inductor is
# the oracle there.
DRAWS_LIKE_EAGER = torch.__version__ >= "2.12"


def check(reference, module, compiled, x, **kwargs):
    oracle = reference if DRAWS_LIKE_EAGER else torch.compile(reference)
    agrees(reference, module, compiled, [x], oracle=oracle, **kwargs)
    assert graphs_compiled() == (2 if DRAWS_LIKE_EAGER else 4)


def make(model, kind, x):
    if kind == "eager":
        return copy.deepcopy(model)
    return cm.bind(torch.export.export(copy.deepcopy(model).train(kind == "bound-train"), (x,)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_evaluates_as_eager(kind):
    reference = ConvNet()
    module = make(reference, kind, IMAGE)
    check(reference, module, torch.compile(module, backend="pt2e_modes"), IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nested_in_a_compiled_parent(kind):
    reference = Parent(ConvNet())
    module = copy.deepcopy(reference)
    module.child = make(reference.child, kind, IMAGE)
    check(reference, module, torch.compile(module, backend="pt2e_modes"), IMAGE)


@pytest.mark.parametrize("kind", ["bound-train", "eager"])
@pytest.mark.parametrize(("build", "x"), nets("norms", "activations", "regions", "attention", "unused"))
@pytest.mark.slow
def test_other_sites(build, x, kind):
    reference = build()
    module = make(reference, kind, x)
    check(reference, module, torch.compile(module, backend="pt2e_modes"), x)


@pytest.mark.slow
def test_an_override_reaches_the_compiled_code():
    reference = ConvNet()
    module = copy.deepcopy(reference)
    compiled = torch.compile(
        module, backend="pt2e_modes", options={"overrides": {"*bn": "eval"}, "fallback_random": True}
    )
    check(reference, module, compiled, IMAGE, touch=lambda m: [b.bn.eval() for b in (m.block1, m.block2)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile(mode):
    reference = ConvNet()
    module = copy.deepcopy(reference)
    check(reference, module, torch.compile(module, backend="pt2e_modes", mode=mode), IMAGE, flips=2)


class Recomputed(nn.Module):
    """Its statistics outside of the checkpoint, for eager would update them twice there."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(4, eps=1e-2, momentum=0.3), nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.fc(x))
        for layer, reentrant in zip(self.layers, (False, True), strict=True):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x


@pytest.mark.slow
def test_activation_checkpoints():
    reference, x = Recomputed(), torch.randn(8, 4)
    module = copy.deepcopy(reference)
    check(reference, module, torch.compile(module, backend="pt2e_modes"), x, flips=2)
    torch._dynamo.reset()
    options = {"overrides": {"bn": "eval", "layers.*": "eval"}, "fallback_random": True}
    output = torch.compile(module.train(), backend="pt2e_modes", options=options)(x)
    torch.testing.assert_close(output, module.eval()(x))
