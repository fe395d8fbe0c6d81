"""Overrides by the names that users know, wherever a module stands."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from backend.overridden import VECTOR
from graphs import owner_matches
from nets import IMAGE, ConvNet, Parent, Regions, Small
from oracle import same_outputs, same_state, same_steps
from setups import bound, compile_

pytestmark = pytest.mark.usefixtures("no_inductor")


def agree(reference, module, compiled, x):
    """Equal outputs and state, call by call: batch norm's statistics move with each of them."""
    same_steps(reference, module, compiled, [x], train=False, tolerance=1e-5)


def to_eval(module: nn.Module, pattern: str) -> None:
    """What an override of a pattern asks for, in eager mode."""
    for name, submodule in module.named_modules():
        if owner_matches(name, pattern):
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


class TestNames:
    """Owners in overrides are the names of ``named_modules()`` of what was compiled, wherever they stand."""

    @pytest.mark.parametrize("pattern", ["child.block1.*", "child.drop", "child.*.bn", "stem.*", "child"])
    @pytest.mark.parametrize("kind", ["eager", "bound"])
    @pytest.mark.every(6)
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
    @pytest.mark.every(3)
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
    @pytest.mark.every(4)
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
            if owner_matches(name, pattern):
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

    @pytest.mark.every(2)
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
