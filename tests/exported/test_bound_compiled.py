"""Bound modules under torch.compile with any backend."""

import copy

import pytest
import torch

import compile_modes as cm
from graphs import graphs_compiled
from nets import (
    IMAGE,
    ConvNet,
    Parent,
)  # fmt: skip
from oracle import agrees
from setups import STARTS, export, twin


def test_compiled_modules_are_bound_through_their_wrapper():
    gm = export(ConvNet(), IMAGE).module()
    compiled = torch.compile(gm, backend="eager")
    compiled(IMAGE)  # compiled before it is bound
    assert cm.bind(compiled) is compiled
    reference = ConvNet()
    gm.load_state_dict(reference.state_dict())
    agrees(reference, gm, compiled, [IMAGE], tolerance=0.0)
    assert compiled.eval() is compiled
    assert not gm.training


@STARTS
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.every(3)
def test_any_number_of_flips_compiles_each_mode_once(start, nested):
    bound = cm.bind(export(ConvNet().train(start), IMAGE))
    module = Parent(bound) if nested else bound
    for flipped in (module, copy.deepcopy(module)):
        flipped.train()
        before = graphs_compiled()
        compiled = torch.compile(flipped, backend="eager")
        for _ in range(20):
            compiled(IMAGE)
            flipped.train(not flipped.training)
        assert graphs_compiled() - before in (0, 2), "a copy may share what its original has compiled"
    assert graphs_compiled() >= 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_bound_modules_under_any_backend(backend):
    reference, bound = twin(ConvNet(), False, IMAGE)
    agrees(reference, bound, torch.compile(bound, backend=backend, fullgraph=True), [IMAGE], tolerance=1e-5)


def test_binding_reaches_a_parent_that_was_compiled_before():
    reference = Parent(ConvNet())
    child = export(copy.deepcopy(reference.child), IMAGE).module()
    module = copy.deepcopy(reference)
    module.child = child
    compiled = torch.compile(module, backend="eager")
    torch.manual_seed(0)
    reference(IMAGE)
    torch.manual_seed(0)
    compiled(IMAGE)
    cm.bind(child)
    agrees(reference, module, compiled, [IMAGE], tolerance=0.0)
