"""Overrides by the names that users know, on what a trace made under other flags can give and can't."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled

from nets import IMAGE, Attention, ConvNet, DropPath, Parent, Recurrent, Regions, Small  # isort: skip
from oracle import same_outputs, same_state  # isort: skip

pytestmark = pytest.mark.usefixtures("no_inductor")


def compile_(module, **options):
    return torch.compile(module, backend="pt2e_modes", options=options)


def bound(model, x, training=True):
    return cm.bind(torch.export.export(copy.deepcopy(model).train(training), (x,)))


def agree(reference, module, compiled, x, seeds=3):
    """Equal outputs and state, call by call: batch norm's statistics move with each of them."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        expected = reference(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(x), expected)
        same_state(reference, module)


def to_eval(module: nn.Module, pattern: str) -> None:
    """What an override of a pattern asks for, in eager mode."""
    for name, submodule in module.named_modules():
        if cm.rewrite.owner_matches(name, pattern):
            submodule.training = False


class Twins(nn.Module):
    """Two modules of one kind, the second of which runs first."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(torch.relu(self.second(x)))


class DropFirst(nn.Module):
    """A dropout before the only parameters: state shows whose it is only afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(x))


class Breaking(nn.Module):
    """A module within which the graph breaks, so that Dynamo compiles its ``forward`` by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.bn(self.fc(x)))
        torch._dynamo.graph_break()
        return y.sin()


def _breaking(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = module.drop(x)
    torch._dynamo.graph_break()
    return y.sin()


class BackToBack(nn.Module):
    """Calls of exported modules with nothing between them, one of them called twice."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(self.a(x)))


VECTOR = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


class TestNames:
    """Owners in overrides are the names of ``named_modules()`` of what was compiled, wherever they stand."""

    @pytest.mark.parametrize("pattern", ["child.block1.*", "child.drop", "child.*.bn", "stem.*", "child"])
    @pytest.mark.parametrize("kind", ["eager", "bound"])
    def test_of_a_nested_module(self, kind, pattern):
        reference = Parent(ConvNet())
        module = copy.deepcopy(reference)
        if kind == "bound":
            module.child = bound(module.child, IMAGE)
        compiled = compile_(module, overrides={pattern: "eval"})
        to_eval(reference, pattern)
        agree(reference, module, compiled, IMAGE)

    def test_of_two_exported_modules_of_one_kind(self):
        reference = Twins(DropFirst(), DropFirst())
        module = Twins(bound(reference.first, VECTOR), bound(reference.second, VECTOR))
        compiled = compile_(module, overrides={"first.drop": "eval"})
        reference.first.eval()
        agree(reference, module, compiled, VECTOR)

    def test_of_copies_called_back_to_back(self):
        a = bound(DropFirst(), VECTOR)
        reference = BackToBack(DropFirst(), DropFirst())
        module = BackToBack(a, copy.deepcopy(a))
        reference.load_state_dict(module.state_dict())
        compiled = compile_(module, overrides={"b.*": "eval"})
        reference.b.eval()
        agree(reference, module, compiled, VECTOR)

    @pytest.mark.parametrize("pattern", ["b.*", "a.drop"])
    @pytest.mark.parametrize("kind", ["modules", "list", "dict", "alias"])
    def test_of_modules_that_are_reached_by_another_name(self, kind, pattern):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = Small(4), Small(4)
                both = [self.a, self.b]
                if kind == "alias":
                    self.first, self.second = both
                self.both = nn.ModuleList(both) if kind == "modules" else both if kind == "list" else None
                self.named = dict(zip("xy", both, strict=True))

            def forward(self, x):
                if kind == "dict":
                    return self.named["y"](self.named["x"](x))
                if kind == "alias":
                    return self.second(self.first(x))
                for module in self.both:
                    x = module(x)
                return x

        reference = Net()
        module = copy.deepcopy(reference)
        compiled = compile_(module, overrides={pattern: "eval"})
        to_eval(reference, pattern)
        agree(reference, module, compiled, VECTOR)

    def test_of_an_exported_module_in_a_dict(self):
        class Net(nn.Module):
            def __init__(self, child):
                super().__init__()
                self.child = child
                self.named = {"k": child}

            def forward(self, x):
                return self.named["k"](x)

        reference = Net(Small(4))
        module = Net(bound(reference.child, VECTOR))
        compiled = compile_(module, overrides={"child.*": "eval"})
        reference.child.bn.eval()
        reference.child.drop.eval()
        agree(reference, module, compiled, VECTOR)

    def test_of_exported_modules_that_nothing_tells_apart(self):
        def child():
            return bound(nn.Sequential(nn.Dropout(0.3), nn.ReLU()), VECTOR)

        with pytest.raises(cm.OverrideError, match="can't be told apart"):
            compile_(nn.Sequential(nn.Linear(4, 4), child(), child()), overrides={"1.0": "eval"})(VECTOR)

    def test_flags_of_regions_are_not_taken_for_pythons(self):
        reference = Regions()
        compiled = compile_(bound(reference, IMAGE), training=False)
        torch.testing.assert_close(compiled(IMAGE), reference.eval()(IMAGE))  # a warning would be an error

    def test_in_regions_of_an_exported_module(self):
        reference = Regions()
        module = bound(reference, IMAGE)
        owners = {site.owner for site in cm.sites(module)}
        stateless = next(owner for owner in owners if isinstance(reference.get_submodule(owner), nn.Dropout2d))
        compiled = compile_(module, overrides={stateless: "eval"})
        reference.get_submodule(stateless).eval()
        agree(reference, module, compiled, IMAGE)

    def test_of_a_module_with_two_programs_inside_an_eager_one(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.fc = nn.Dropout(0.4), nn.Linear(4, 4)

            def forward(self, x):
                y = self.fc(self.drop(x))
                return y * 2 if self.training else y

        child = Net()
        reference = nn.Sequential(nn.Dropout(0.3), child)
        module = nn.Sequential(nn.Dropout(0.3), cm.export(copy.deepcopy(child), (VECTOR,)))
        compiled = compile_(module, overrides={"1.drop": "eval"})
        reference[1].drop.eval()
        agree(reference, module, compiled, VECTOR)

    def test_of_a_submodule_that_is_compiled_by_itself(self):
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = ConvNet()

            def forward(self, x):
                try:
                    torch._dynamo.graph_break()
                    return self.inner(x)
                except ValueError:
                    return x

        reference = Broken()
        module = copy.deepcopy(reference)
        compiled = compile_(module, overrides={"inner.block1.*": "eval"})
        reference.inner.block1.bn.eval()
        reference.inner.block1.drop.eval()
        agree(reference, module, compiled, IMAGE)

    @pytest.mark.parametrize("pattern", ["layers.0.*", "layers.1.*", "layers.2.drop"])
    @pytest.mark.parametrize("flags", [True, False])
    def test_of_modules_of_one_type_that_dynamo_compiles_by_themselves(self, flags, pattern):
        class Stack(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(Breaking() for _ in range(3))

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x

        reference = Stack().train(flags)
        module = copy.deepcopy(reference)
        compiled = compile_(module, overrides={pattern: "eval" if flags else "train"})
        for name, submodule in reference.named_modules():
            if cm.rewrite.owner_matches(name, pattern):
                submodule.training = not flags
        for x in (VECTOR, VECTOR.clone().requires_grad_()):
            agree(reference, module, compiled, x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12

    def test_of_a_module_outside_a_function_that_dynamo_compiles_by_itself(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.last = nn.Dropout(0.3), nn.Dropout(0.2)

            def forward(self, x):
                return self.last(_breaking(self, x))

        reference = Net()
        module = copy.deepcopy(reference)
        compiled = compile_(module, overrides={"drop": "eval", "last": "eval"})
        reference.last.eval()
        reference.drop.eval()
        agree(reference, module, compiled, VECTOR)

    @pytest.mark.parametrize("where", ["global", "local"])
    def test_of_a_module_in_a_compiled_function(self, where):
        reference = ConvNet()
        module = copy.deepcopy(reference)

        def step(x):
            return module(x)

        def step_of(x, model):
            return model(x)

        call = step if where == "global" else lambda x: step_of(x, module)
        compiled = torch.compile(call, backend="pt2e_modes", options={"overrides": {"block1.bn": "eval"}})
        reference.block1.bn.eval()
        agree(reference, module, compiled, IMAGE)

    def test_of_a_module_that_is_compiled_in_place(self):
        reference = Parent(ConvNet())
        module = copy.deepcopy(reference)
        module.child.compile(backend="pt2e_modes", options={"overrides": {"block1.*": "eval"}})
        reference.child.block1.bn.eval()
        reference.child.block1.drop.eval()
        agree(reference, module, module, IMAGE)


class Projected(nn.Module):
    """Attention as models of their own write it: the probability stands in an attribute of the module."""

    def __init__(self, p: float, fused: bool = True) -> None:
        super().__init__()
        self.p, self.fused = p, fused
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            out = F.dropout((q @ k.mT).softmax(-1), p, self.training) @ v
        return out.transpose(1, 2).flatten(2)


STEPS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(5))
SEQUENCE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


class TestAttention:
    @pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "weights"])
    @pytest.mark.parametrize("options", [{"training": True}, {"overrides": {"1": "train"}}], ids=["all", "1"])
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


class Behind(nn.Module):
    """Recurrent layers behind something that Dynamo does compile."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recurrent()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.relu(x))


class TestRecurrent:
    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_between_layers(self, training):
        reference = Recurrent().train(not training)
        compiled = compile_(copy.deepcopy(reference), training=training)
        reference.train(training)
        with torch._dynamo.config.patch(allow_rnn=True):
            for seed in range(3):
                torch.manual_seed(seed)
                expected = reference(STEPS)
                torch.manual_seed(seed)
                torch.testing.assert_close(compiled(STEPS), expected)

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


class TestCounters:
    """A batch norm that is awake counts, also where Dynamo compiles it as a variable of its own."""

    @pytest.mark.parametrize("build", [lambda: nn.BatchNorm1d(4), lambda: BehindABreak()], ids=["root", "break"])
    def test_of_a_batch_norm_that_is_a_frames_own(self, build):
        reference = build().eval()
        module = copy.deepcopy(reference)
        compiled = compile_(module, training=True)
        reference.train()
        for _ in range(3):
            same_outputs(reference, compiled, VECTOR)
        same_state(reference, module)


class BehindABreak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.doubled(x))


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


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x


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

    def test_is_no_matter_of_fast_paths(self):
        reference = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        compiled = compile_(copy.deepcopy(reference), training=False)
        reference.eval()
        torch.testing.assert_close(compiled(SEQUENCE), reference(SEQUENCE))
        assert graphs_compiled() == 1
