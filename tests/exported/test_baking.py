"""``bake``: flags back to literals."""

import copy

import pytest
import torch

import compile_modes as cm
from nets import (
    IMAGE,
    Attention,
    ConvNet,
    Regions,
)  # fmt: skip
from oracle import text
from setups import STARTS, export


@STARTS
def test_bake_writes_the_flags_back(start):
    bound = cm.bind(export(ConvNet().train(start), IMAGE))
    graphs = text(export(ConvNet().train(start), IMAGE).module())
    assert cm.bake(bound) is bound
    assert text(bound) == graphs
    with pytest.raises(cm.BindError, match="baked"):
        bound.eval()
    assert cm.bind(bound).eval() is bound


def test_bake_refuses_what_is_no_mode():
    bound = cm.bind(export(ConvNet(), IMAGE))
    graphs = text(bound)
    with pytest.raises(cm.OptionError, match="training is 'eval'"):
        cm.bake(bound, training="eval")
    assert text(bound) == graphs
    with pytest.raises(cm.BindError, match="no site is bound"):
        cm.bake(export(ConvNet(), IMAGE).module(), training=False)


def test_bake_keeps_submodule_modes_unless_told():
    bound = cm.bind(export(ConvNet(), IMAGE))
    bound.block1.eval()
    mixed = {s.owner: s.training for s in cm.sites(cm.bake(copy.deepcopy(bound)))}
    assert mixed == {
        "": True,
        "drop": True,
        "block1.bn": False,
        "block1.drop": False,
        "block2.bn": True,
        "block2.drop": True,
    }
    baked = cm.bake(copy.deepcopy(bound), training=False)
    assert text(baked) == text(export(ConvNet().eval(), IMAGE).module())
    assert bound.block2.training, "the original is another module"


@pytest.mark.parametrize("build", [Regions, Attention])
def test_bind_and_bake_are_inverse_in_regions_and_attention(build):
    x = IMAGE if build is Regions else torch.randn(2, 5, 8)
    gm = export(build(), x).module()
    graphs = text(gm)
    assert text(cm.bake(cm.bind(gm))) == graphs
    evaluated = cm.bake(cm.bind(gm), training=False)
    reference = build().eval()
    reference.load_state_dict(evaluated.state_dict())
    assert torch.equal(evaluated(x), reference(x))
