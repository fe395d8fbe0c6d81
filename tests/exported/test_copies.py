"""Copies of compiled modules with modes are compiled as those are, with flags of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled
from nets import IMAGE, Auxiliary, ConvNet, Parent
from oracle import agrees

Compiled = torch._dynamo.OptimizedModule
BUILD = pytest.mark.parametrize("build", [ConvNet, Auxiliary], ids=["one program", "two programs"])


class Backend:
    """Counts the graphs that it is given, and lets them run as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        self.graphs += 1
        return gm.forward


def exported(build):
    reference = build()
    return reference, cm.export(copy.deepcopy(reference), (IMAGE,))


@BUILD
@pytest.mark.every(2)
def test_a_copy_of_a_compiled_module_is_compiled_by_the_same_backend(build):
    reference, module = exported(build)
    backend = Backend()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    compiled(IMAGE)
    first = copy.deepcopy(compiled)
    for copied in (first, copy.deepcopy(first)):
        assert type(copied) is Compiled
        assert copied._orig_mod is not module
        assert type(copied._orig_mod).__name__ == type(module).__name__
        assert copied.dynamo_ctx is compiled.dynamo_ctx
        own = copy.deepcopy(reference)
        own.load_state_dict(copied._orig_mod.state_dict())
        before = backend.graphs
        agrees(own, copied._orig_mod, copied, [IMAGE], flips=2, steps=1, tolerance=0.0)
        assert backend.graphs - before in (1, 2), "a copy may share what its original has compiled"
        assert copied.training is not module.training
    assert type(copy.deepcopy(module)) is not Compiled
    assert compiled.__deepcopy__({})._orig_mod is not module


def test_flags_weights_and_options_of_a_copy(no_inductor):
    _, module = exported(ConvNet)
    compiled = torch.compile(module, backend="pt2e_modes", options={"overrides": {"block1.*": "eval"}}).train()
    copied = copy.deepcopy(compiled)
    copied.eval()
    assert compiled.training
    assert all(m.training for m in module.modules())
    copied.train()(IMAGE)
    inner = copied._orig_mod
    assert (inner.block1.bn.num_batches_tracked, inner.block2.bn.num_batches_tracked) == (0, 1), "options are kept"
    assert module.block2.bn.num_batches_tracked == 0
    assert {p.data_ptr() for p in compiled.parameters()}.isdisjoint(p.data_ptr() for p in copied.parameters())


@BUILD
@pytest.mark.every(2)
def test_modules_that_contain_a_compiled_module(build):
    reference, module = exported(build)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    parent = nn.ModuleDict({"plain": module, "fast": compiled})
    copied = copy.deepcopy(parent)
    assert type(copied["fast"]) is Compiled
    assert copied["fast"]._orig_mod is copied["plain"], "what was one module is one"
    assert copied["plain"] is not module
    agrees(reference, copied["plain"], copied["fast"], [IMAGE], flips=1, steps=1, tolerance=0.0)
    outer = Parent(compiled)
    other = copy.deepcopy(outer).eval()
    assert type(other.child) is Compiled
    assert compiled.training
    assert torch.equal(other(IMAGE), copy.deepcopy(outer).eval()(IMAGE))


@BUILD
@pytest.mark.every(2)
def test_a_module_compiled_in_place(build):
    reference, module = exported(build)
    backend = Backend()
    module.compile(backend=backend, fullgraph=True)
    for copied in (copy.deepcopy(module), copy.deepcopy(copy.deepcopy(module))):
        assert copied._compiled_call_impl is not None
        before = backend.graphs
        agrees(copy.deepcopy(reference), copied, inputs=[IMAGE], flips=2, steps=1, tolerance=0.0)
        assert backend.graphs - before in (0, 2)
    assert backend.graphs >= 2
    assert module.training
    assert copy.deepcopy(nn.Sequential(module))[0]._compiled_call_impl is not None
    assert copy.deepcopy(exported(build)[1])._compiled_call_impl is None


@pytest.mark.parametrize(("build", "bound_late"), [(ConvNet, False), (ConvNet, True), (Auxiliary, False)])
@pytest.mark.every(2)
def test_an_average_of_weights_is_compiled(build, bound_late):
    reference, module = exported(build)
    if bound_late:
        module = torch.export.export(copy.deepcopy(reference), (IMAGE,)).module()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        cm.bind(compiled)
    else:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
    averages = [
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in (reference, compiled)
    ]
    assert type(averages[1].module) is Compiled
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (reference, compiled)]
    for seed in range(3):
        for model, optimizer, average in zip((reference, compiled), optimizers, averages, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            output = model.train()(IMAGE)
            (output[0] if isinstance(output, tuple) else output).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
    before = graphs_compiled()
    outputs = [average.eval()(IMAGE) for average in averages]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert graphs_compiled() - before == 1
    assert compiled.training, "the average has flags of its own"


def test_a_copy_outlives_edits_of_its_graph():
    _, module = exported(ConvNet)
    compiled = torch.compile(module, backend="eager")
    cm.bind(cm.bake(compiled))
    copied = copy.deepcopy(compiled)
    cm.set_mode(copied, False)
    assert type(copy.deepcopy(copied)) is Compiled
    assert compiled.training
