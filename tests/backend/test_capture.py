import pytest
import torch
import torch.utils.checkpoint
from expecttest import assert_expected_inline
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload

import compile_modes as cm
from compile_modes.backend.capture import capture
from nets import Small
from oracle import text

CLONE = torch.ops.aten.clone.default  # what is left of an eval dropout, on some releases
X = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))


def captured(model, x=X, rewrite=None):
    """The captured graph of a model's one Dynamo graph, and what running it returns."""
    seen = []

    def backend(gm, example_inputs):
        graph = capture(gm, example_inputs)
        if rewrite is not None:
            cm.set_mode(graph, rewrite)
        seen.append(graph)
        return graph.forward

    torch.manual_seed(0)
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    (graph,) = seen
    return graph, output


def eager(model, x=X):
    torch.manual_seed(0)
    return model(x)


def test_the_captured_train_graph_and_its_eval_rewrite():
    graph, output = captured(Small(2))
    assert_expected_inline(
        text(graph),
        """\
v0 = aten.add_.Tensor(bn.num_batches_tracked, 1)
v1 = aten.batch_norm.default(l_x_, bn.weight, bn.bias, bn.running_mean, bn.running_var, True, 0.03, 0.001, True)
v2 = aten.dropout.default(v1, 0.25, True)
return (v2)""",
    )
    assert torch.equal(output, eager(Small(2)))
    graph, output = captured(Small(2), rewrite=False)
    assert_expected_inline(
        text(graph),
        """\
v0 = aten.batch_norm.default(l_x_, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.03, 0.001, True)
v1 = aten.dropout.default(v0, 0.25, False)
return (v1)""",
    )
    assert torch.equal(output, eager(Small(2).eval()))


def test_the_captured_eval_graph_and_its_train_rewrite():
    graph, output = captured(Small(2).eval())
    assert_expected_inline(
        text(graph),
        """\
v0 = aten.batch_norm.default(l_x_, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.03, 0.001, True)
v1 = aten.dropout.default(v0, 0.25, False)
return (v1)""",
    )
    assert torch.equal(output, eager(Small(2).eval()))
    # Dynamo's eval graph has no counter: only the backend, which sees the live module, can honour this.
    report = cm.set_mode(graph, True)
    assert [site.op.family for site in report.changed] == ["dropout"]
    assert "out of the graph's reach" in report.refused[0][1]


def test_inputs_keep_names_meta_and_sources():
    dynamo_graphs = []

    def backend(gm, example_inputs):
        dynamo_graphs.append((gm, capture(gm, example_inputs)))
        return gm.forward

    torch.compile(Small(2), backend=backend)(X)
    ((before, after),) = dynamo_graphs
    old, new = (gm.graph.find_nodes(op="placeholder") for gm in (before, after))
    assert [n.name for n in new] == [n.name for n in old]
    for a, b in zip(old, new, strict=True):
        assert b.meta["tensor_dict"] is a.meta["tensor_dict"]
        assert b._dynamo_source is a._dynamo_source


def test_regions_of_grad_mode_stay():
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                y = self.drop(self.fc(x))
            return self.fc(x) + y

    model = Region()
    graph, output = captured(model)
    assert torch.equal(output, eager(model))
    assert [s.owner for s in cm.sites(graph)] == ["drop"]
    assert "_set_grad_enabled(False)" in text(graph)


def test_drawing_on_fake_tensors_leaves_the_random_state_alone():
    model = Small(2)
    torch.manual_seed(0)
    captured(model)
    after_capture = torch.get_rng_state()
    eager(model)
    assert torch.equal(torch.get_rng_state(), after_capture)


def test_the_body_of_a_checkpoint_is_captured():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = Small(2)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.small, x, use_reentrant=False)

    graph, output = captured(Checkpointed())
    assert_expected_inline(
        text(graph),
        """\
v0 = tag_activation_checkpoint(wrap_body_0, small.bn.num_batches_tracked, l_x_, small.bn.running_mean, small.bn.running_var, small.bn.weight, small.bn.bias, use_reentrant=False)
v1 = getitem(v0, 0)
return (v1)
v0 = aten.add_.Tensor(small.bn.num_batches_tracked, 1)
v1 = aten.batch_norm.default(l_x_, small.bn.weight, small.bn.bias, small.bn.running_mean, small.bn.running_var, True, 0.03, 0.001, True)
v2 = aten.dropout.default(v1, 0.25, True)
return (v2)""",  # noqa: E501
    )
    assert torch.equal(output, eager(Checkpointed()))
    graph, output = captured(Checkpointed(), rewrite=False)
    assert "add_" not in text(graph)
    assert torch.equal(output, eager(Checkpointed().eval()))


def test_what_cannot_be_retraced_says_so():
    def changes(x):
        torch.set_default_dtype(torch.float64)
        y = torch.ones(2)
        torch.set_default_dtype(torch.float32)
        return x + y.float()

    errors = []

    def backend(gm, example_inputs):
        try:
            capture(gm, example_inputs)
        except cm.CaptureError as error:
            errors.append(error)
        return gm.forward

    torch.compile(changes, backend=backend)(X)
    assert "y has dtype torch.float32 now, torch.float64 before" in errors[0].cause
    assert "torch.ones" in errors[0].where


def test_inputs_whose_metadata_the_graph_has_changed_are_noticed():
    """A fake tensor that shows the layout at the graph's end must not stand for the one at its start."""
    errors = []

    def backend(gm, example_inputs):
        (placeholder,) = gm.graph.find_nodes(op="placeholder")
        placeholder.meta["example_value"] = placeholder.meta["example_value"].t()
        with pytest.raises(cm.CaptureError, match="metadata of input l_x_") as error:
            capture(gm, example_inputs)
        errors.append(error)
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend)(X)
    assert errors


@pytest.mark.parametrize("mode", [True, False])
def test_the_forward_and_backward_that_autograd_derives(mode, monkeypatch):
    """The graphs after AOTAutograd, from the other mode's capture: batch statistics and a mask in train only."""
    graphs = {}

    def keep(name):
        def compiler(gm, example_inputs):
            graphs[name] = gm
            return make_boxed_func(gm.forward)

        return compiler

    autograd = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))

    def backend(gm, example_inputs):
        graph = capture(gm, example_inputs)
        if not mode:
            cm.set_mode(graph, False)
        return autograd(graph, example_inputs)

    model, reference = Small(2), Small(2).train(mode)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.manual_seed(0)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    torch.manual_seed(0)
    reference(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(model.bn.weight.grad, reference.bn.weight.grad)
    torch.testing.assert_close(model.bn.running_var, reference.bn.running_var)
    assert model.bn.num_batches_tracked == reference.bn.num_batches_tracked
    shown = "\n".join(
        f"{name}: "
        + " ".join(str(n.target) for n in g.graph.nodes if isinstance(n.target, OpOverload) and n.target is not CLONE)
        for name, g in graphs.items()
    )
    if mode:
        assert_expected_inline(
            shown,
            """\
forward: aten.add.Tensor aten._native_batch_norm_legit_functional.default aten.native_dropout.default
backward: aten.native_dropout_backward.default aten.native_batch_norm_backward.default""",
        )
    else:
        assert_expected_inline(
            shown,
            """\
forward: aten._native_batch_norm_legit_no_training.default
backward: aten.native_batch_norm_backward.default""",
        )


@pytest.mark.parametrize("options", [{}, {"tune": True}, {"training": True}])
@pytest.mark.usefixtures("no_inductor")
def test_parameters_are_not_watched(options):
    """torch refuses to swap those that are."""
    model = nn.Linear(4, 4)
    torch.compile(model, backend="pt2e_modes", options=options)(torch.randn(2, 4)).sum().backward()
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.ones(4, 4)))
