"""Recurrent modules under compile: dropout between layers, and gradients."""

import copy

import pytest
import torch
from torch import fx, nn

import compile_modes as cm
from compile_modes import _compat
from compile_modes.forms.lower import lower
from compile_modes.forms.recurrent import split_layers
from graphs import View, add_note, graphs_compiled, module_path, note, sites
from nets import Checkpointed, RecurrentStack
from oracle import agrees, seeded, text
from setups import bound, compile_

aten = torch.ops.aten
SEQUENCE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
LSTM, GRU, RNN = nn.LSTM, nn.GRU, nn.RNN
DEEP = {"num_layers": 3, "dropout": 0.3, "bidirectional": True, "batch_first": True}
CASES = [
    pytest.param(LSTM, {"num_layers": 2, "dropout": 0.5}, id="lstm"),
    pytest.param(LSTM, DEEP, id="lstm-deep"),
    pytest.param(LSTM, {"num_layers": 2, "dropout": 0.4, "proj_size": 3}, id="lstm-projection"),
    pytest.param(LSTM, {**DEEP, "num_layers": 2, "proj_size": 3, "bias": False}, id="lstm-projection-deep"),
    pytest.param(LSTM, {"num_layers": 2, "dropout": 0.4, "bias": False}, id="lstm-without-bias"),
    pytest.param(LSTM, {"num_layers": 1, "bidirectional": True}, id="lstm-one-layer"),
    pytest.param(LSTM, {"num_layers": 2}, id="lstm-without-dropout"),
    pytest.param(LSTM, {"num_layers": 2, "dropout": 1.0}, id="lstm-drops-all"),
    pytest.param(GRU, {"num_layers": 2, "dropout": 0.5}, id="gru"),
    pytest.param(GRU, DEEP, id="gru-deep"),
    pytest.param(GRU, {"num_layers": 2, "dropout": 0.4, "bias": False}, id="gru-without-bias"),
    pytest.param(GRU, {"num_layers": 1}, id="gru-one-layer"),
    pytest.param(RNN, {"num_layers": 2, "dropout": 0.5}, id="tanh"),
    pytest.param(RNN, {**DEEP, "nonlinearity": "relu"}, id="relu-deep"),
]
# Whose settings are those of other cases together; the rewrite itself is tested on all of them.
TOGETHER = ("lstm-deep", "lstm-projection", "lstm-projection-deep", "lstm-without-bias", "gru-deep", "gru-without-bias")
COMPILED = [
    pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if case.id in TOGETHER else []) for case in CASES
]
# An LSTM becomes its steps, which is more of a change than the layers of a GRU.
CELLS = pytest.mark.parametrize("cell", [LSTM, pytest.param(GRU, marks=pytest.mark.slow)])

OPTIONS = [({"training": True}, True), ({"overrides": {"*": "train"}}, True), ({"training": False}, False)]


def exported(model, *args):
    return torch.export.export(model, args).module()


def calls(gm):
    """The ops of the graph that the rewrite is about, in turn."""
    told = (aten.lstm.input, aten.gru.input, aten.dropout.default)
    return [node.target for node in gm.graph.nodes if node.target in told]


@pytest.mark.usefixtures("no_inductor")
class TestWithoutInductor:
    @pytest.mark.parametrize(("cell", "settings"), COMPILED)
    @pytest.mark.every(6)
    def test_trains_and_evaluates_as_eager(self, cell, settings):
        reference = cell(4, 5, **settings)
        module = bound(reference, SEQUENCE)
        draws = settings.get("dropout") != 1.0  # for which aten.native_dropout draws, unlike aten.dropout
        agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2, generator=draws)
        assert graphs_compiled() == 2

    @CELLS
    @pytest.mark.slow
    def test_exported_in_eval_mode(self, cell):
        reference = cell(4, 5, num_layers=2, dropout=0.5)
        module = bound(reference, SEQUENCE, start=False)
        agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2)

    @CELLS
    @pytest.mark.slow
    def test_a_given_state(self, cell):
        reference = cell(4, 5, num_layers=2, dropout=0.5)
        hx = torch.randn(2, 3, 5)
        args = (SEQUENCE, (hx, hx + 1) if cell is LSTM else hx)
        module = bound(reference, *args)
        agrees(reference, module, compile_(module), args, flips=2, steps=2)

    @CELLS
    @pytest.mark.slow
    def test_a_single_sequence(self, cell):
        reference = cell(4, 5, num_layers=2, dropout=0.5, bidirectional=True)
        module = bound(reference, SEQUENCE[:, 0])
        agrees(reference, module, compile_(module), [SEQUENCE[:, 0]], flips=2, steps=2)

    @pytest.mark.slow
    @CELLS
    def test_dropout_is_live(self, cell):
        reference = cell(4, 50, num_layers=2, dropout=0.5)
        module = bound(reference, SEQUENCE)
        results = []
        for call in (reference, compile_(module)):
            x = SEQUENCE.clone().requires_grad_()
            output = seeded(call, x)[0]
            (gradient,) = torch.autograd.grad(output.square().sum(), x)
            results.append((output, gradient))
        torch.testing.assert_close(results[1], results[0])
        first, second = compile_(module)(SEQUENCE)[0], compile_(module)(SEQUENCE)[0]
        without = module.eval()(SEQUENCE)[0]
        assert (first - second).abs().mean() > 1e-3
        assert (first - without).abs().mean() > 1e-3

    @CELLS
    def test_without_gradients(self, cell):
        reference = cell(4, 5, num_layers=2, dropout=0.5, bias=False)
        module = bound(reference, SEQUENCE)
        compiled = compile_(module)
        for mode in (True, False):
            reference.train(mode), module.train(mode)
            with torch.no_grad():
                torch.testing.assert_close(seeded(compiled, SEQUENCE), seeded(reference, SEQUENCE))

    @pytest.mark.parametrize("frozen", ["weights", "all but the state"])
    def test_frozen_weights(self, frozen):
        reference = LSTM(4, 5, num_layers=2, dropout=0.5)
        for name, parameter in reference.named_parameters():
            parameter.requires_grad_(frozen == "weights" and name.startswith("bias"))
        hx = torch.randn(2, 3, 5, requires_grad=frozen != "weights")
        module = bound(reference, SEQUENCE, (hx, hx))
        gradients = []
        for call in (reference, compile_(module)):
            loss = seeded(call, SEQUENCE, (hx, hx))[0].square().sum()
            leaf = hx if hx.requires_grad else (reference if call is reference else module).bias_hh_l0
            gradients.append(torch.autograd.grad(loss, leaf))
        torch.testing.assert_close(gradients[1], gradients[0])

    @pytest.mark.slow
    def test_nested_in_a_compiled_parent(self):
        lstm, gru = LSTM(4, 5, num_layers=2, dropout=0.4), GRU(4, 5, num_layers=2, dropout=0.3)
        reference = RecurrentStack(lstm, gru)
        module = RecurrentStack(bound(lstm, SEQUENCE), bound(gru, SEQUENCE))
        module.fc.load_state_dict(reference.fc.state_dict())
        agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2)
        assert graphs_compiled() == 2

    @pytest.mark.slow
    def test_exported_with_its_parent(self):
        reference = RecurrentStack(LSTM(4, 5, num_layers=2, dropout=0.4), GRU(4, 5, num_layers=2, dropout=0.3))
        module = bound(reference, SEQUENCE)
        agrees(reference, module, compile_(module), [SEQUENCE], flips=2, touch=lambda m: m.gru.train())
        assert graphs_compiled() == 2

    @pytest.mark.slow
    @CELLS
    def test_one_graph_for_any_batch_size(self, cell):
        reference = cell(4, 5, num_layers=2, dropout=0.5)
        batch = torch.export.Dim("batch", min=2)
        module = bound(reference, SEQUENCE, dynamic_shapes=({1: batch}, *([None] * 0)))
        compiled = torch.compile(module, backend="pt2e_modes", dynamic=True)
        for size in (3, 4, 5):  # none of them as long as the sequences, which dynamic=True would take for the same size
            agrees(reference, module, compiled, [torch.randn(2, size, 4)], flips=1, steps=1)
        assert graphs_compiled() == 2

    @pytest.mark.parametrize(
        ("options", "mode"),
        [pytest.param(o, m, id=str(o)) for o, m in OPTIONS],
    )
    @pytest.mark.every(3)
    def test_options(self, options, mode):
        reference = LSTM(4, 5, num_layers=2, dropout=0.5)
        module = bound(reference, SEQUENCE, start=not mode)
        compiled = compile_(module, **options)
        agrees(reference, module, compiled, [SEQUENCE], oracle=lambda x: reference.train(mode)(x), flips=1)

    def test_eager_modules_that_dynamo_is_allowed_to_trace(self):
        reference = LSTM(4, 5, num_layers=2, dropout=0.5)
        module = copy.deepcopy(reference)
        with torch._dynamo.config.patch(allow_rnn=True):
            agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2)
            assert graphs_compiled() == 2

    @pytest.mark.slow
    def test_in_the_body_of_a_checkpoint(self):
        reference = Checkpointed(LSTM(4, 5, num_layers=2, dropout=0.5))
        module = Checkpointed(bound(reference.child, SEQUENCE))
        agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2)

    @pytest.mark.slow
    def test_a_graph_that_is_compiled_as_it_came(self, monkeypatch):
        handed = []

        def compile_fx(gm, example_inputs):
            handed.append(gm)
            if len(handed) == 1:
                raise RuntimeError("no lowering")
            return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

        monkeypatch.setattr(_compat, "inductor", lambda mode, options: compile_fx)
        reference = LSTM(4, 5, num_layers=2, dropout=0.5)
        module = bound(reference, SEQUENCE)
        with pytest.warns(cm.ModeWarning, match="as it came: RuntimeError: no lowering\n  what"):
            agrees(reference, module, compile_(module), [SEQUENCE], flips=1)
        assert handed[0] is not handed[1]


class TestSplitLayers:
    """The rewrite itself, on exported graphs, which run in eager mode too."""

    @pytest.mark.parametrize(("cell", "settings"), CASES)
    @pytest.mark.every(2)
    def test_computes_what_eager_computes(self, cell, settings):
        model = cell(4, 5, **settings)
        gm = exported(model, SEQUENCE)
        assert split_layers(View(gm), sites(gm))[1] == []
        gm.graph.lint()
        torch.testing.assert_close(seeded(gm, SEQUENCE), seeded(model, SEQUENCE))

    def test_one_call_per_layer(self):
        gm = exported(GRU(4, 5, num_layers=3, dropout=0.3), SEQUENCE)
        split_layers(View(gm), sites(gm))
        assert calls(gm) == [aten.gru.input, aten.dropout.default] * 2 + [aten.gru.input]
        assert [site.p for site in sites(gm) if site.op.family == "dropout"] == [0.3, 0.3]

    def test_twice_is_once(self):
        for model in (GRU(4, 5, num_layers=3, dropout=0.3), LSTM(4, 5, num_layers=2, dropout=0.3)):
            gm = exported(model, SEQUENCE)
            split_layers(View(gm), sites(gm))
            once = text(gm)
            split_layers(View(gm), sites(gm))
            assert text(gm) == once

    @pytest.mark.parametrize(
        "model",
        [GRU(4, 5, num_layers=2, dropout=0.3).eval(), GRU(4, 5, num_layers=2), RNN(4, 5, bidirectional=True)],
        ids=["eval", "without dropout", "one layer"],
    )
    def test_leaves_alone_what_torch_gets_right(self, model):
        gm = exported(model, SEQUENCE)
        before = text(gm)
        assert split_layers(View(gm), sites(gm))[1] == []
        assert text(gm) == before

    def test_keeps_the_inference_kernel_where_autograd_does_not_look(self):
        gm = exported(LSTM(4, 5, num_layers=2, dropout=0.3).eval(), SEQUENCE)
        before = text(gm)
        with torch.no_grad():
            split_layers(View(gm), sites(gm))
        assert text(gm) == before
        split_layers(View(gm), sites(gm))
        assert aten.lstm.input not in calls(gm)

    def test_reaches_into_regions(self):
        model = RecurrentStack(LSTM(4, 5, num_layers=2, dropout=0.4), GRU(4, 5, num_layers=2, dropout=0.3))
        gm = exported(model, SEQUENCE)
        split_layers(View(gm), sites(gm))
        owners = [(site.owner, site.p, site.body.parent is None) for site in sites(gm) if site.op.family == "dropout"]
        assert owners == [("lstm", 0.4, True), ("gru", 0.3, False)]
        torch.testing.assert_close(seeded(gm, SEQUENCE), seeded(model, SEQUENCE))

    def test_an_lstm_in_a_region_without_grad_stays_whole(self):
        model = RecurrentStack(GRU(4, 5), LSTM(4, 5, num_layers=2, dropout=0.3))
        gm = exported(model, SEQUENCE)
        split_layers(View(gm), sites(gm))
        kept = [site for site in sites(gm) if site.op.overload is aten.lstm.input]
        assert len(kept) == 2
        assert all(site.body.parent is not None for site in kept)

    @pytest.mark.parametrize("cell", [LSTM, GRU])
    def test_new_nodes_carry_the_meta_of_the_site(self, cell):
        gm = exported(RecurrentStack(cell(4, 5, num_layers=2, dropout=0.3), GRU(4, 5)), SEQUENCE)
        site = sites(gm)[0]
        assert site.owner == "lstm"
        add_note(site.node, mark=1)
        before = set(gm.graph.nodes)
        split_layers(View(gm), sites(gm))
        new = [node for node in gm.graph.nodes if node not in before]
        assert len(new) > 4
        for node in new:
            assert module_path(node) == site.owner
            assert node.meta["nn_module_stack"] == site.node.meta["nn_module_stack"]
            assert node.meta["stack_trace"] == site.node.meta["stack_trace"]
            assert note(node) == {"mark": 1}
            assert "val" in node.meta

    def test_packed_sequences_are_left_and_said(self):
        graph = fx.Graph()
        data, batch_sizes, hx, *params = [graph.placeholder(f"x{i}") for i in range(11)]
        call = graph.call_function(aten.gru.data, (data, batch_sizes, hx, params, True, 2, 0.5, True, False))
        graph.output(call)
        gm = fx.GraphModule(nn.Module(), graph)
        before = text(gm)
        assert [site.node for site in split_layers(View(gm), sites(gm))[1]] == [call]
        assert text(gm) == before
        with pytest.warns(cm.ModeWarning, match="without its dropout between layers"):
            lower(gm, sites(gm))


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "settings"), [CASES[0], CASES[1], CASES[9]])
def test_through_inductor(cell, settings):
    reference = cell(4, 5, **settings)
    module = bound(reference, SEQUENCE)
    agrees(reference, module, compile_(module), [SEQUENCE], flips=2, steps=2)
    assert graphs_compiled() == 2
