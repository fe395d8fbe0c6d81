"""Attention, whose dropout probability an eval export has lost."""

import copy
import warnings

import pytest
import torch
from torch import nn

import compile_modes as cm
from exported.python_decides import Weights
from nets import (
    Attention,
)  # fmt: skip
from oracle import agrees
from setups import STARTS, export, twin


@STARTS
def test_attention_dropout_follows_when_its_p_is_known(start):
    x = torch.randn(2, 5, 8)
    if not start:
        with pytest.warns(cm.ModeWarning, match="its p is lost"):
            bound = cm.bind(export(Attention().eval(), x))
        assert [s.bound for s in cm.sites(bound)] == [False, True]
        return
    reference, bound = twin(Attention(), True, x)
    agrees(reference, bound, inputs=[x], tolerance=0.0)


def test_attention_without_dropout_warns_of_nothing_in_train():
    with warnings.catch_warnings():
        warnings.simplefilter("error", cm.ModeWarning)
        cm.bind(export(Attention(p=0.0), torch.randn(2, 5, 8)))


@pytest.mark.parametrize(
    ("build", "owner"),
    [(Attention, ""), (Weights, "attention"), (lambda p: nn.TransformerEncoderLayer(8, 2, 16, p), "self_attn")],
)
def test_attention_dropout_that_an_eval_export_has_lost_can_be_supplied(build, owner):
    x = torch.randn(2, 5, 8)
    reference = build(0.3)
    program = export(copy.deepcopy(reference).eval(), x)
    with pytest.warns(cm.ModeWarning, match=f"owner '{owner}'.*(its p is lost)"):
        cm.bind(program)
    bound = cm.bind(program, dropout_p={owner or "": 0.3})
    agrees(reference, bound, inputs=[x], tolerance=0.0)


@pytest.mark.parametrize(
    ("dropout_p", "error", "says"),
    [
        ({"block": 0.1}, cm.OverrideError, "'block' matches no attention or functional dropout site"),
        ({"": 1.5}, cm.OptionError, "1.5 is no probability"),
        ({"": "0.1"}, cm.OptionError, "'0.1' is no probability"),
        (0.1, cm.OptionError, "0.1 is no mapping"),
    ],
)
def test_unusable_probabilities(dropout_p, error, says):
    program = export(Attention().eval(), torch.randn(2, 5, 8))
    with pytest.raises(error, match=says):
        cm.bind(program, dropout_p=dropout_p)
    with pytest.raises(cm.OptionError, match="has kept its own probability"):
        cm.bind(export(Attention(), torch.randn(2, 5, 8)), dropout_p={"": 0.1})
