"""Ways to compile and to call: each on eager and bound modules, flipped, beside eager ones."""

import pytest
import torch

from composition.models import KINDS, X, make
from graphs import graphs_compiled
from oracle import agrees, same_step
from setups import compile_

no_inductor = pytest.mark.usefixtures("no_inductor")


@no_inductor
@KINDS
def test_fullgraph(kind):
    reference, module = make(kind)
    agrees(reference, module, torch.compile(module, backend="pt2e_modes", fullgraph=True), [X], flips=2)
    assert graphs_compiled() == 2


@no_inductor
@KINDS
@pytest.mark.every(2)
def test_dynamic_with_changing_batch_sizes(kind):
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    reference, module = make(kind, shapes)
    compiled = torch.compile(module, backend="pt2e_modes", dynamic=True)
    graphs = []
    for size in (6, 5, 4):
        agrees(reference, module, compiled, [X[:size]], flips=1, steps=1)
        graphs.append(graphs_compiled())
    assert graphs[2] == graphs[1] <= 4  # stock torch.compile compiles both modes again for the second size, too


@no_inductor
@KINDS
@pytest.mark.slow
def test_bf16_autocast_around_the_call(kind):
    reference, module = make(kind)

    def within(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    compiled = within(compile_(module))
    agrees(reference, module, compiled, [X], oracle=within(reference), flips=2, tolerance=1e-2)
    assert compiled(X).dtype is torch.bfloat16
    assert graphs_compiled() == 2


@no_inductor
@KINDS
@pytest.mark.slow
def test_channels_last(kind):
    reference, module = make(kind)
    for m in (reference, module):
        m.to(memory_format=torch.channels_last)
    agrees(reference, module, compile_(module), [X.to(memory_format=torch.channels_last)], flips=2)
    assert module.block1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert graphs_compiled() == 2


@no_inductor
@KINDS
@pytest.mark.parametrize("context", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_evaluated_without_gradients_between_training(kind, context):
    reference, module = make(kind)
    compiled = compile_(module)
    for _ in range(2):
        agrees(reference, module, compiled, [X], flips=1)
        for mode in (False, True):  # in train mode: an estimate of statistics, or MC dropout
            for m in (reference, module):
                m.train(mode)
            with context():
                _, found = same_step(reference, module, compiled, [X], tolerance=1e-5)
            assert (found.requires_grad, found.is_inference()) == (False, context is torch.inference_mode)
    assert graphs_compiled() == 4  # two modes, with and without gradients


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_torch_compile_on_a_bound_module(mode):
    reference, module = make("bound")
    oracle = reference if torch.__version__ >= "2.12" else torch.compile(reference)  # 2.11: see test_inductor.py
    compiled = torch.compile(module, backend="pt2e_modes", mode=mode)
    agrees(reference, module, compiled, [X], oracle=oracle, flips=2)
    assert graphs_compiled() == (2 if oracle is reference else 4)


@pytest.mark.slow
def test_together_through_inductor():
    """Dynamic shapes, autocast, channels_last and inference_mode in one bound module."""
    reference, module = make("bound", {"x": {0: torch.export.Dim("batch", min=2, max=64)}})
    for m in (reference, module):
        m.to(memory_format=torch.channels_last)

    def within(call):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return run

    oracle = reference if torch.__version__ >= "2.12" else torch.compile(reference, dynamic=True)
    compiled = torch.compile(module, backend="pt2e_modes", dynamic=True, fullgraph=True)
    x = X.contiguous(memory_format=torch.channels_last)
    agrees(reference, module, within(compiled), [x], oracle=within(oracle), flips=2, steps=2, tolerance=2e-2)
    for m in (reference, module):
        m.eval()
    with torch.inference_mode():
        torch.testing.assert_close(within(compiled)(X), within(reference)(X), rtol=2e-2, atol=2e-2)
