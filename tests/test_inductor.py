"""End to end through Inductor: what the README promises, in full."""

import copy

import pytest
import torch

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled

from nets import IMAGE, Activations, Attention, ConvNet, Norms, Parent, Regions, UnusedNorm  # isort: skip
from oracle import agrees  # isort: skip

KINDS = ["eager", "bound-train", "bound-eval"]
SLOW = [
    pytest.param(Activations, torch.randn(3, 4, 6), id="activations"),
    pytest.param(Norms, torch.randn(3, 4, 5), id="norms"),
    pytest.param(Regions, IMAGE, id="regions"),
    pytest.param(Attention, torch.randn(2, 5, 8), id="attention"),
    pytest.param(UnusedNorm, torch.randn(3, 4), id="unused"),
]


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "bound-train"])
@pytest.mark.parametrize(("build", "x"), SLOW)
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
