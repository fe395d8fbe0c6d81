# ruff: noqa: E501
"""What the backend says, word for word, when options ask for what can't be had."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from backend.overridden import SEQUENCE, STEPS, VECTOR, Behind, Branching, Projected
from nets import IMAGE, ConvNet, Parent

pytestmark = pytest.mark.usefixtures("no_inductor")


def said(module, x, **options):
    with pytest.raises(cm.CompileModesError) as error:
        torch.compile(module, backend="pt2e_modes", options=options)(x)
    # Dynamo adds a line on its own verbosity to whatever a backend raises.
    return str(error.value).split("\n\n")[0]


def test_a_pattern_that_matches_nothing():
    assert_expected_inline(
        said(Parent(ConvNet()), IMAGE, overrides={"child.blok1.bn": "eval"}),
        """\
CM109: the pattern 'child.blok1.bn' matches no mode-dependent site
  where: overrides['child.blok1.bn']
  what to do: owners here: 'child.block1.bn', 'child.block2.bn', 'child.block1.drop'""",
    )


def test_a_pattern_that_matches_nothing_in_a_part():
    class Broken(Parent):
        def forward(self, x):
            x = self.stem(x)
            torch._dynamo.graph_break()
            return self.child(x)

    assert_expected_inline(
        said(Broken(ConvNet()), IMAGE, overrides={"child.blok1.bn": "eval"}),
        """\
CM109: the pattern 'child.blok1.bn' matches no part of the module, let alone a site
  where: overrides['child.blok1.bn']
  what to do: owners here: 'child.block1.bn', 'child.block2.bn', 'child.block1'""",
    )


def test_a_mode_that_is_none():
    assert_expected_inline(
        said(ConvNet(), IMAGE, overrides={"*bn": "frozen"}),
        """\
CM104: 'frozen' is not a mode
  where: overrides['*bn']
  what to do: use 'train' or 'eval'""",
    )


def test_overrides_that_are_none():
    assert_expected_inline(
        said(ConvNet(), IMAGE, overrides=["*bn"]),
        """\
CM102: overrides is a list
  what to do: pass {"layer4.*": "eval"}""",
    )


def test_a_training_that_is_no_mode():
    assert_expected_inline(
        said(ConvNet(), IMAGE, training="eval"),
        """\
CM101: training is 'eval'
  what to do: pass True, False, or None to leave the modes alone""",
    )


def test_attention_that_has_lost_its_probability():
    module = nn.ModuleDict({"attn": Projected(0.3)}).eval()
    module.forward = lambda x: module["attn"](x)
    assert_expected_inline(
        said(module, SEQUENCE, overrides={"attn": "train"}),
        """\
CM135: 1 sites can't be put into the mode that was asked for:
  scaled_dot_product_attention (aten.scaled_dot_product_attention.default, owner 'attn', eval): CM713: dropout_p is 0: the op had none, or it was traced in eval mode and its p is lost
  what to do: leave them out by a pattern of their own that comes first, such as {'attn': 'eval'}; or say what it has lost, 0.0 for none: options={'dropout_p': {'attn': 0.1}}""",
    )


def test_a_probability_that_is_none():
    assert_expected_inline(
        said(nn.Sequential(Projected(0.3)), SEQUENCE, dropout_p={"0": 1.5}),
        """\
CM106: 1.5 is no probability
  where: dropout_p['0']
  what to do: pass a number from 0 to below 1""",
    )


def test_what_python_decides():
    module = nn.Sequential(Branching(), nn.Dropout(0.2))
    assert_expected_inline(
        said(module, VECTOR, overrides={"0": "eval"}),
        """\
CM132: the pattern '0' names modules that have no mode-dependent op: Python reads their flag
  where: overrides['0'], 0
  what to do: set the flag itself, by train() or eval() of that module""",
    )
    with pytest.warns(cm.ModeWarning) as warned:
        torch.compile(module, backend="pt2e_modes", options={"training": False})(VECTOR)
    assert_expected_inline(
        str(warned[0].message),
        """\
CM141: '0' (Branching) read their training flag in Python, where options can't reach: what depends on it stays as the flag says.
  what to do: set the flag, by train() or eval() of the module""",
    )


def test_a_fused_kernel():
    module = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True).eval()
    with torch.no_grad():
        assert_expected_inline(
            said(module, SEQUENCE, overrides={"dropout1": "train"}),
            """\
CM131: the pattern 'dropout1' names parts of a fused kernel of inference
  where: overrides['dropout1'], _transformer_encoder_layer_fwd (aten._transformer_encoder_layer_fwd.default, owner '', eval)
  what to do: call torch.backends.mha.set_fastpath_enabled(False) first, or run the model with gradients""",
        )


def test_recurrent_modules_that_dynamo_leaves_out():
    assert_expected_inline(
        said(Behind(), STEPS, overrides={"inner.gru": "eval"}),
        """\
CM133: Dynamo leaves GRU modules to eager mode, where options can't reach
  where: owner 'inner.gru'
  what to do: set torch._dynamo.config.allow_rnn = True, or set the flag, by train() or eval()""",
    )
