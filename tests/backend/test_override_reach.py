"""What options reach only if told more, or not at all: what Python decides, and parts that stay in eager mode."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from backend.overridden import SEQUENCE, STEPS, VECTOR, Behind, Branching, Projected
from compile_modes._compat import frames
from compile_modes.backend.entry import _at_compilation
from graphs import graphs_compiled
from nets import IMAGE, Attention, ConvNet, DropPath, Recurrent
from oracle import same_outputs, same_state
from setups import compile_

pytestmark = pytest.mark.usefixtures("no_inductor")


class TestAttention:
    @pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "weights"])
    @pytest.mark.parametrize("options", [{"training": True}, {"overrides": {"1": "train"}}], ids=["all", "1"])
    @pytest.mark.every(3)
    def test_torchs_own_module_trains_with_its_dropout(self, options, weights):
        class Net(nn.ModuleList):
            def forward(self, x):
                x = self[0](x)
                return self[1](x, x, x, need_weights=weights)[0]

        reference = Net([nn.Linear(8, 8), nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)]).eval()
        module = copy.deepcopy(reference)
        compiled = compile_(module, **options)
        reference.train()
        same_outputs(reference, compiled, SEQUENCE)
        assert not torch.equal(compiled(SEQUENCE), compiled(SEQUENCE))

    def test_and_evaluates_without(self):
        reference = Attention()
        compiled = compile_(copy.deepcopy(reference), training=False)
        same_outputs(reference.eval(), compiled, SEQUENCE)

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_probability_that_is_nowhere_is_asked_for(self, fused):
        module = nn.Sequential(Projected(0.3, fused)).eval()
        with pytest.raises(cm.OverrideError, match=r"p is 0: the op had none") as caught:
            compile_(module, training=True)(SEQUENCE)
        assert "'dropout_p': {'0': 0.1}" in str(caught.value)
        compiled = compile_(module, training=True, dropout_p={"0": 0.3})
        same_outputs(copy.deepcopy(module).train(), compiled, SEQUENCE)

    def test_none_may_be_what_there_was(self):
        module = nn.Sequential(Projected(0.0), nn.Dropout(0.2)).eval()
        reference = copy.deepcopy(module).train()
        same_outputs(reference, compile_(module, training=True, dropout_p={"0": 0.0}), SEQUENCE)
        same_outputs(
            reference, compile_(copy.deepcopy(reference), training=True), SEQUENCE
        )  # traced in train: it shows

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("start", [True, False])
    @pytest.mark.every(6)
    def test_of_a_bound_module(self, start, fused):
        reference = Projected(0.3, fused)
        dropout_p = None if start else {"": 0.3}
        module = cm.bind(torch.export.export(copy.deepcopy(reference).train(start), (SEQUENCE,)), dropout_p=dropout_p)
        compiled = {mode: compile_(module, training=mode) for mode in (True, False)}
        for flag in (True, False):
            module.train(flag)
            for mode in (True, False):
                same_outputs(reference.train(mode), compiled[mode], SEQUENCE)

    def test_a_fused_kernel_of_inference_says_how_to_be_without_it(self):
        module = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True).eval()
        compiled = compile_(module, overrides={"dropout*": "train"})
        with torch.no_grad(), pytest.raises(cm.OverrideError, match=r"set_fastpath_enabled\(False\)"):
            compiled(SEQUENCE)


class TestRecurrent:
    @pytest.mark.slow
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.every(2)
    def test_dropout_between_layers(self, training):
        reference = Recurrent().train(not training)
        compiled = compile_(copy.deepcopy(reference), training=training)
        reference.train(training)
        with torch._dynamo.config.patch(allow_rnn=True):
            same_outputs(reference, compiled, STEPS, tolerance=1e-5)

    def test_what_dynamo_leaves_to_eager_is_out_of_reach(self):
        with pytest.raises(cm.OverrideError, match=r"allow_rnn = True"):
            compile_(Behind(), overrides={"*.gru": "eval"})(STEPS)
        compile_(Behind(), overrides={"*.gru": "train"})(STEPS)  # as the flag says

    @pytest.mark.parametrize("options", [{"training": False}, {"overrides": {"1.gru": "eval"}}])
    def test_is_said_when_another_part_is_compiled(self, options):
        module = nn.Sequential(Branching(), Recurrent(), nn.Dropout(0.1))
        module[0].register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
        with pytest.raises(cm.OverrideError, match=r"owner '1.(gru|lstm)'"):
            compile_(module, **options)(STEPS)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_is_said_where_nothing_is_compiled(self, at_start, in_place):
        module = nn.LSTM(4, 4, 2, dropout=0.5)
        with pytest.raises(cm.OverrideError, match=r"^CM133: .*LSTM"):
            called(module, in_place, training=False)(SEQUENCE[..., :4])


@pytest.fixture
def at_start():
    """Lets the backend hear of compilations before it is called, as in a process that has not reset Dynamo."""
    frames.at_compilations(_at_compilation)


def called(module, in_place, **options):
    """What to call of a module that is compiled, in place or not."""
    if not in_place:
        return compile_(module, **options)
    module.compile(backend="pt2e_modes", options=options)
    return module


class TestCumulative:
    """Batch norms with ``momentum=None``, for which Dynamo leaves a train call to eager mode."""

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("options", [{"training": False}, {"overrides": {"*": "eval"}}], ids=["all", "owner"])
    @pytest.mark.parametrize("alone", [False, True])
    def test_is_refused_before_anything_is_written(self, at_start, alone, options, in_place):
        norm = nn.BatchNorm1d(4, momentum=None)
        module = norm if alone else nn.Sequential(nn.Linear(4, 4), norm)
        before = copy.deepcopy(module)
        with pytest.raises(cm.OverrideError, match=r"^CM137: .*BatchNorm1d") as caught:
            called(module, in_place, **options)(VECTOR)
        assert caught.value.where == f"owner {'' if alone else '1'!r}"
        same_state(before, module, 0.0)

    def test_is_refused_after_a_reset_where_another_part_is_compiled(self):
        module = Broken()
        module.body[1] = nn.BatchNorm1d(4, momentum=None)
        before = copy.deepcopy(module)
        with pytest.raises(cm.OverrideError, match=r"^CM137: .*\n  where: owner 'body.1'"):
            compile_(module, overrides={"body.1": "eval", "*": "train"})(VECTOR)
        same_state(before, module, 0.0)

    def test_what_the_flags_say_is_no_request(self, at_start):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
        reference = copy.deepcopy(module)
        for mode in (True, False):
            compiled = compile_(module.train(mode), training=mode)
            same_outputs(reference.train(mode), compiled, VECTOR)
            same_state(reference, module, 0.0)

    def test_within_exportable_it_is_reached(self, at_start):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
        reference = copy.deepcopy(module).eval()
        with cm.exportable(module):
            same_outputs(reference, compile_(module, training=False), VECTOR)
        same_state(reference, module, 0.0)


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


class Broken(nn.Module):
    """A graph break in a loop, for which Dynamo leaves the loop to eager mode, behind something that it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Breaks(), nn.Dropout(0.4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.bn(x))


class TestEagerParts:
    """What options ask of modules that Dynamo leaves to eager mode is said once a call has shown it."""

    WARNING = r"'body.{}' \(\w+\) were in no graph that Dynamo compiled"

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize(
        ("options", "flags", "left"),
        [
            ({"overrides": {"*bn": "eval", "*.1": "eval"}}, True, "1"),
            ({"overrides": {"*bn": "eval", "body.3": "train"}}, False, "3"),
            ({"training": False}, True, "1' .*, 'body.3"),
        ],
    )
    def test_behind_what_is_compiled(self, options, flags, left, in_place):
        module = Broken().train(flags)
        if in_place:
            module.compile(backend="pt2e_modes", options=options)
        call = module if in_place else compile_(module, **options)
        call(VECTOR)
        with pytest.warns(cm.ModeWarning, match=self.WARNING.format(left)):
            call(VECTOR)
        call(VECTOR)

    def test_where_nothing_is_compiled(self):
        compile_(nn.Linear(4, 4), training=False)(VECTOR)  # after the reset before each test, the package is asleep
        call = compile_(Broken().body.train(), overrides={"3": "eval"})
        call(VECTOR)
        with pytest.warns(cm.ModeWarning, match=r"'3' \(Dropout\) were in no graph"):
            call(VECTOR)
        call = compile_(Broken().body.train(), overrides={"4": "eval"})
        call(VECTOR)
        with pytest.raises(cm.OverrideError, match="'4' matches no part of the module"):
            call(VECTOR)

    def test_is_said_when_the_flags_differ(self):
        module = Broken().eval()
        call = compile_(module, overrides={"bn": "eval", "*.1": "eval"})
        for _ in range(3):
            call(VECTOR)
        module.train()
        with pytest.warns(cm.ModeWarning, match=self.WARNING.format("1")):
            call(VECTOR)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_is_not_said_of_what_is_compiled_whole(self, in_place):
        module = ConvNet()
        module.uncalled = nn.Dropout(0.1)
        module.eval()
        if in_place:
            module.compile(backend="pt2e_modes", options={"training": True})
        call = module if in_place else compile_(module, training=True)
        for _ in range(3):
            call(IMAGE)


class TestPython:
    """What ``self.training`` decides in Python follows the flag; options can't reach it, and say so."""

    def test_is_said_where_all_are_asked(self):
        module = nn.Sequential(Branching(), nn.Dropout(0.2))
        with pytest.warns(cm.ModeWarning, match=r"'0' \(\w+\) read their training flag in Python"):
            compile_(module, training=False)(VECTOR)

    def test_is_said_again_of_other_modules_and_options(self):
        module = nn.Sequential(Branching(), nn.Dropout(0.2))
        asked = [(module, {"training": False}), (copy.deepcopy(module), {"training": False})]
        for one, options in [*asked, (module, {"overrides": {"*": "eval"}})]:
            with pytest.warns(cm.ModeWarning, match=r"'0' \(\w+\) read their training flag in Python"):
                compile_(one, **options)(VECTOR)
            torch._dynamo.reset()
            compile_(one, **options)(VECTOR)
            torch._dynamo.reset()

    def test_is_an_error_where_it_alone_is_asked(self):
        module = nn.Sequential(Branching(), nn.Dropout(0.2))
        with pytest.raises(cm.OverrideError, match=r"set the flag itself"):
            compile_(module, overrides={"0": "eval"})(VECTOR)

    def test_a_mask_that_is_frozen_stays_so_over_flips(self):
        reference = nn.Sequential(nn.Linear(4, 4), DropPath(0.4), nn.BatchNorm1d(4))
        module = copy.deepcopy(reference)
        compiled = compile_(module, overrides={"1": "eval"})
        for mode in (True, False, True):
            reference.train(mode)[1].eval()
            module.train(mode)
            same_outputs(reference, compiled, VECTOR)
        same_state(reference, module)

    def test_is_fine_where_the_flag_says_the_same(self):
        reference = nn.Sequential(Branching(), nn.Dropout(0.2))
        compiled = compile_(copy.deepcopy(reference), training=True)
        same_outputs(reference, compiled, VECTOR)

    def test_a_mask_made_in_python_can_be_taken_out_but_not_invented(self):
        reference = nn.Sequential(DropPath(0.4), nn.Linear(4, 4))
        compiled = compile_(copy.deepcopy(reference), training=False)
        same_outputs(copy.deepcopy(reference).eval(), compiled, VECTOR)
        with pytest.warns(cm.ModeWarning, match=r"'0' \(\w+\) read their training flag in Python"):
            compile_(copy.deepcopy(reference).eval(), training=True)(VECTOR)

    @pytest.mark.slow
    def test_is_no_matter_of_fast_paths(self):
        reference = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        compiled = compile_(copy.deepcopy(reference), training=False)
        reference.eval()
        torch.testing.assert_close(compiled(SEQUENCE), reference(SEQUENCE))
        assert graphs_compiled() == 1
