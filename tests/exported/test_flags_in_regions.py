"""A region's graph can't reach the modules that own its sites; their flags decide there all the same, however set."""

import copy

import pytest
import torch

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, Regions
from oracle import same_step


def bound():
    reference = Regions()
    return reference, cm.bind(torch.export.export(copy.deepcopy(reference), (IMAGE,)))


def test_attributes_count_as_train_and_eval_do():
    reference, module = bound()
    for root in (True, False):
        for path in ("frozen.bn", "frozen.drop", "mixed.bn", "mixed.drop"):
            for m in (reference, module):
                m.train(root).get_submodule(path).training = not root
            same_step(reference, module, inputs=[IMAGE], tolerance=0.0)


def test_copies_and_compiled_modules_read_their_own(no_inductor):
    reference, module = bound()
    step = torch.compile(module, backend="pt2e_modes")
    copied, other = copy.deepcopy(module), copy.deepcopy(reference)
    for m in (reference, module):
        m.train().frozen.bn.training = False
    for m in (other, copied):
        m.eval().frozen.bn.training = True
    same_step(reference, module, step, inputs=[IMAGE])
    same_step(other, copied, inputs=[IMAGE], tolerance=0.0)


def test_there_is_no_second_copy_of_a_mode():
    _, module = bound()
    module.train()
    for submodule in module.modules():  # whoever restores flags one by one, in whatever order
        submodule.training = False
    assert not any(site.training for site in cm.sites(module))
    module.get_submodule("submod_1").train()  # a region's body owns nothing
    assert not any(site.training for site in cm.sites(module))


@pytest.mark.parametrize("name", ["frozen.bn", "mixed.drop"])
def test_warmed_up_modes_are_those_that_are_used(name, no_inductor):
    _, module = bound()
    step = torch.compile(module, backend="pt2e_modes")
    cm.warmup(step, IMAGE, modes=[{name: "eval", "*": "train"}], progress=False)
    before = graphs_compiled()
    module.train().get_submodule(name).eval()
    step(IMAGE)[0].sum().backward()
    assert graphs_compiled() == before
