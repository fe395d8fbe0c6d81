import random

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

import compile_modes as cm
from nets import (
    IMAGE,
    TOKENS,
    Attention,
    ConvNet,
    Parent,
)
from oracle import agrees, literals, same_outputs, same_step, same_steps, text
from setups import nets


def export(model, *args):
    return torch.export.export(model, args).module()


@pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
@pytest.mark.parametrize(
    ("build", "x"), nets("conv", "activations", "norms", "recurrent", "regions", "unused", "counter")
)
@pytest.mark.every(3)
def test_rewritten_graphs_equal_eager_in_both_modes(build, x, start):
    reference = build()
    gm = export(build().train(start), x)
    gm.load_state_dict(reference.state_dict())
    for mode in (not start, start, not start):
        report = cm.set_mode(gm, mode)
        assert report.changed
        assert not report.refused
        reference.train(mode)
        same_steps(reference, gm, inputs=[x], train=False, tolerance=0.0)


@pytest.mark.parametrize(
    ("build", "x"), nets("conv", "activations", "norms", "recurrent", "regions", "unused", "counter")
)
def test_ten_round_trips_change_no_literal_but_the_mode(build, x):
    model = build()
    for module in model.modules():  # literals that no default could stand in for
        if hasattr(module, "p") and isinstance(module.p, float):
            module.p = random.uniform(0.05, 0.9)
        if getattr(module, "eps", None) is not None:
            module.eps = random.uniform(1e-6, 1e-2)
        if getattr(module, "momentum", None) is not None:
            module.momentum = random.uniform(0.01, 0.9)
    gm = export(model, x)
    graphs, before = text(gm), literals(gm)
    for _ in range(10):
        cm.set_mode(gm, False)
        assert literals(gm) == before
        cm.set_mode(gm, True)
        assert literals(gm) == before
    assert text(gm) == graphs


def test_a_rewrite_twice_is_a_rewrite_once():
    gm = export(ConvNet(), IMAGE)
    first = cm.set_mode(gm, False)
    code = gm.code
    second = cm.set_mode(gm, False)
    assert (len(first.changed), len(second.changed), len(second.unchanged)) == (7, 0, 7)
    assert gm.code == code


def test_the_eval_rewrite_is_the_eval_export():
    rewritten, evaluated = export(ConvNet(), IMAGE), export(ConvNet().eval(), IMAGE)
    cm.set_mode(rewritten, False)
    assert text(rewritten) == text(evaluated)


def test_the_graph_of_each_mode():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm1d(2, eps=1e-3, momentum=0.03)
            self.act = torch.nn.RReLU()

        def forward(self, x):
            return torch.nn.functional.dropout(self.act(self.bn(x)), 0.25, self.training)

    gm = export(Small().eval(), torch.randn(3, 2))
    assert_expected_inline(
        text(gm),
        """\
v0 = aten.batch_norm.default(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.03, 0.001, False)
v1 = aten.rrelu.default(v0)
v2 = aten.dropout.default(v1, 0.25, False)
return (v2)""",
    )
    cm.set_mode(gm, True)
    assert_expected_inline(
        text(gm),
        """\
v0 = aten.add_.Tensor(bn.num_batches_tracked, 1)
v1 = aten.batch_norm.default(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, True, 0.03, 0.001, False)
v2 = aten.rrelu.default(v1, training=True)
v3 = aten.dropout.default(v2, 0.25, True)
return (v3)""",
    )
    reference = Small()
    gm.load_state_dict(reference.state_dict())
    x = torch.randn(3, 2)
    same_step(reference, gm, inputs=[x], tolerance=0.0)


def test_attention_dropout_goes_and_comes_back():
    reference = Attention()
    gm = export(Attention(), TOKENS)
    gm.load_state_dict(reference.state_dict())
    for mode in (False, True, False, True):
        assert not cm.set_mode(gm, mode).refused
        reference.train(mode)
        same_outputs(reference, gm, TOKENS, seeds=1)


def test_attention_exported_in_eval_is_refused_with_the_reason():
    gm = export(Attention().eval(), TOKENS)
    report = cm.set_mode(gm, True)
    assert [(s.op.family, why[:21]) for s, why in report.refused] == [("attention", "CM713: dropout_p is 0")]
    assert "1 changed, 0 already right, 1 refused" in str(report)
    assert literals(gm)[0]["dropout_p"] in (None, 0.0)


def test_overrides_first_match_wins_and_none_leaves_the_rest():
    gm = export(ConvNet(), IMAGE)
    report = cm.set_mode(gm, None, overrides={"block1.bn": "train", "*bn": "eval"})
    assert [site.owner for site in report.changed] == ["block2.bn"]
    assert {s.owner for s in cm.sites(gm) if not s.training} == {"block2.bn"}


def test_overrides_equal_eager_submodule_modes():
    reference, gm = ConvNet(), export(ConvNet(), IMAGE)
    gm.load_state_dict(reference.state_dict())
    cm.set_mode(gm, False, overrides={"block1.*": "train"})
    reference.eval()
    reference.block1.train()
    same_step(reference, gm, inputs=[IMAGE], tolerance=0.0)


@pytest.mark.parametrize(
    ("training", "overrides", "error"),
    [
        ("eval", None, cm.OptionError),
        (1, None, cm.OptionError),
        (True, {"drop": "off"}, cm.OptionError),
        (True, {"drop": True}, cm.OptionError),
        (True, {"drop": ["eval"]}, cm.OptionError),
        (True, ["drop"], cm.OptionError),
        (True, {"drop": "eval", "nothing.*": "eval"}, cm.OverrideError),
    ],
)
def test_a_refused_call_leaves_the_graph_as_it_was(training, overrides, error):
    gm = export(ConvNet(), IMAGE)
    code = gm.code
    with pytest.raises(error):
        cm.set_mode(gm, training, overrides=overrides)
    assert gm.code == code


def test_set_mode_of_a_bound_graph_sets_its_flags():
    reference = ConvNet()
    bound = cm.bind(torch.export.export(ConvNet(), (IMAGE,)))
    bound.load_state_dict(reference.state_dict())
    code = bound.code
    assert len(cm.set_mode(bound, False).changed) == 7
    assert bound.code == code
    assert not bound.block1.bn.training
    agrees(reference, bound, inputs=[IMAGE], flips=1)


def test_flags_given_by_name_and_computed_flags():
    graph = fx.Graph()
    x, flag = graph.placeholder("x"), graph.placeholder("flag")
    named = graph.call_function(torch.ops.aten.dropout.default, (x,), {"p": 0.5, "train": True})
    graph.output(graph.call_function(torch.ops.aten.dropout.default, (named, 0.5, flag)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    report = cm.set_mode(gm, False)
    assert named.kwargs == {"p": 0.5, "train": False}
    assert "computed in the graph" in report.refused[0][1]


def test_native_dropout_none_means_train():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.native_dropout.default, (x, 0.5, None))
    graph.output(node)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert cm.sites(gm)[0].training
    cm.set_mode(gm, False)
    assert node.args[2] is False
    assert torch.equal(gm(torch.ones(3))[0], torch.ones(3))


def test_a_rewrite_reaches_a_parent_that_was_compiled_before():
    gm = export(ConvNet(), IMAGE)
    parent = Parent(gm)
    parent.stem.eval()
    compiled = torch.compile(parent, backend="eager")
    compiled(IMAGE)
    cm.set_mode(gm, False)
    assert torch.equal(compiled(IMAGE), compiled(IMAGE)), "the compiled parent must run the eval graph now"
