"""The option ``modes="data"``: one graph for all modes of dropouts, and guards where anything else depends on them."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compile_modes as cm
from compile_modes.errors import ModeWarning, OptionError
from graphs import graphs_compiled

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
DROPOUTS = {
    "dropout": (lambda: nn.Dropout(0.4), (8, 16)),
    "dropout in place": (lambda: nn.Dropout(0.4, inplace=True), (8, 16)),
    "channels": (lambda: nn.Dropout2d(0.4), (4, 6, 3, 3)),
    "volumes": (lambda: nn.Dropout3d(0.4), (4, 6, 2, 2, 2)),
    "rows": (lambda: nn.Dropout1d(0.4), (4, 6, 3)),
    "rows, no batch": (lambda: nn.Dropout1d(0.4), (6, 3)),
    "alpha": (lambda: nn.AlphaDropout(0.4), (8, 16)),
    "alpha, channels": (lambda: nn.FeatureAlphaDropout(0.4), (4, 6, 3, 3)),
    "channels in place": (lambda: nn.Dropout2d(0.4, inplace=True), (4, 6, 3, 3)),
    "all": (lambda: nn.Dropout(1.0), (8, 16)),
    "none": (lambda: nn.Dropout(0.0), (8, 16)),
}


class Layers(nn.Module):
    """Linear layers, each with a ReLU and a dropout behind."""

    def __init__(self, count=6, p=0.3):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))
        self.drops = nn.ModuleList(nn.Dropout(p) for _ in range(count))

    def forward(self, x):
        for linear, drop in zip(self.linears, self.drops, strict=True):
            x = drop(F.relu(linear(x)))
        return x


class Then(nn.Module):
    """Something of the user's behind a dropout."""

    def __init__(self, behind, drop=None):
        super().__init__()
        self.linear, self.drop, self.behind = nn.Linear(16, 16), drop or nn.Dropout(0.5), behind

    def forward(self, x):
        return self.behind(self, self.drop(self.linear(x)))


class Twice(nn.Module):
    """Autograd keeps nothing of it, so that its result may be written to."""

    def forward(self, x):
        return x * 2


def compiled(model, **options):
    return torch.compile(model, backend="pt2e_modes", options={"modes": "data", **options})


def put(model, vector, names=None):
    """Puts the dropouts of a model into the modes of a vector."""
    drops = (
        [m for m in model.modules() if isinstance(m, nn.Dropout)] if names is None else map(model.get_submodule, names)
    )
    for drop, mode in zip(drops, vector, strict=True):
        drop.train(bool(mode))


def run(call, model, x, seed=3):
    """Output, gradients and the next random number."""
    torch.manual_seed(seed)
    given = x.clone().requires_grad_()
    output = call(given)
    after = torch.rand(1)
    gradients = torch.autograd.grad(output.square().sum(), [given, *model.parameters()])
    return [output.detach(), after, *gradients]


def same_as_eager(call, model, eager, x=X):
    for ours, theirs in zip(run(call, model, x), run(eager, eager, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def silent():
    """Nothing is warned of: all modes of the graph are data."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModeWarning)
        yield


@pytest.mark.usefixtures("no_inductor", "silent")
class TestOneGraph:
    @pytest.mark.parametrize("first", [True, False])
    def test_64_vectors_of_an_eager_module(self, first):
        model, eager = Layers().train(first), Layers()
        eager.load_state_dict(model.state_dict())
        call = compiled(model)
        for vector in [(first,) * 6, *itertools.product([0, 1], repeat=6)]:
            put(model, vector)
            put(eager, vector)
            same_as_eager(call, model, eager)
            with torch.no_grad():
                torch.manual_seed(0)
                ours = call(X)
                torch.manual_seed(0)
                assert torch.equal(ours, eager(X))
        assert graphs_compiled() == 2  # with gradients and without

    @pytest.mark.every(2)
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("how", ["bind", "export"])
    def test_64_vectors_of_a_bound_module(self, how, first):
        eager = Layers().train(first)
        program = cm.export if how == "export" else lambda m, args: cm.bind(torch.export.export(m, args))
        bound = program(copy.deepcopy(eager), (X,))
        call = compiled(bound)
        names = [f"drops.{i}" for i in range(6)]
        for vector in itertools.product([0, 1], repeat=6):
            put(bound, vector, names)
            put(eager, vector)
            same_as_eager(call, bound, eager)
        assert graphs_compiled() == 1

    def test_steps_of_an_optimizer_and_flips(self):
        model = Layers()
        eager = copy.deepcopy(model)
        call, steppers = compiled(model), [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, eager)]
        for step in range(12):
            for m in (model, eager):
                put(m, [(step >> i) & 1 for i in range(6)])
            for run_it, stepper in zip((call, eager), steppers, strict=True):
                torch.manual_seed(step)
                stepper.zero_grad()
                run_it(X).square().mean().backward()
                stepper.step()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert graphs_compiled() == 1

    def test_backward_after_a_flip_has_the_flags_of_its_forward(self):
        model = Layers(1)
        eager = copy.deepcopy(model)
        call = compiled(model)
        put(model, [0])
        call(X).sum().backward()
        model.zero_grad()
        for m, it in ((model, call), (eager, eager)):
            put(m, [1])
            torch.manual_seed(0)
            output = it(X)
            put(m, [0])
            it(X)
            output.sum().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)

    @pytest.mark.parametrize("kind", DROPOUTS)
    @pytest.mark.parametrize("first", [True, False])
    def test_every_kind_of_dropout(self, kind, first):
        make, shape = DROPOUTS[kind]
        drop, x = make().train(first), torch.randn(shape)
        model = nn.Sequential(Twice(), drop, nn.Tanh())
        eager = copy.deepcopy(model)
        call = compiled(model)
        for mode in (first, not first, first):
            drop.train(mode)
            eager[1].train(mode)
            same_as_eager(call, model, eager, x)
        assert graphs_compiled() == 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_types(self, dtype):
        model = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
        call, x = compiled(model), X.to(dtype)
        for mode in (True, False):
            model.train(mode)
            torch.manual_seed(0)
            ours = call(x)
            torch.manual_seed(0)
            assert torch.equal(ours, model(x))
            assert ours.dtype == dtype

    def test_another_memory_format(self):
        model = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
        x = torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last)
        same_as_eager(compiled(model), model, model, x)

    @pytest.mark.parametrize("flat", [False, True])
    def test_sizes_that_vary(self, flat):
        model = nn.Sequential(*([nn.Flatten(0, 1)] if flat else []), nn.Tanh(), nn.Dropout(0.3))
        call = torch.compile(model, backend="pt2e_modes", options={"modes": "data"}, dynamic=True)
        for size in (3, 5, 9):
            for mode in (True, False):
                model.train(mode)
                same_as_eager(call, model, model, torch.randn(size, size + 1, 2))
        assert graphs_compiled() == 1

    def test_statistics_of_a_mixed_vector(self):
        model = nn.Sequential(Twice(), nn.Dropout(0.25), nn.Dropout(0.5))
        call, x = compiled(model), torch.ones(40_000)
        put(model, [0, 1])
        assert set(call(x).unique().tolist()) == {0.0, 4.0}
        put(model, [1, 0])
        y = call(x)
        assert abs(float((y == 0).float().mean()) - 0.25) < 0.02
        assert abs(float(y.mean()) - 2) < 0.02
        put(model, [1, 1])
        assert abs(float((call(x) == 0).float().mean()) - (1 - 0.75 * 0.5)) < 0.02

    def test_copies_have_flags_of_their_own(self):
        model = Layers(2)
        other = copy.deepcopy(model)
        calls = compiled(model), compiled(other)
        put(model, [1, 0])
        put(other, [0, 0])
        for _ in range(2):
            same_as_eager(calls[0], model, model)
            same_as_eager(calls[1], other, other)
            put(other, [0, 1])

    def test_another_module_in_the_place_of_one(self):
        model = Layers(1)
        call = compiled(model)
        call(X)
        old, model.drops[0] = model.drops[0], nn.Dropout(0.3).eval()
        old.train()
        same_as_eager(call, model, model)

    def test_one_dropout_in_two_places(self):
        drop = nn.Dropout(0.5)
        model = nn.Sequential(nn.Linear(16, 16), drop, nn.Linear(16, 16), drop)
        call = compiled(model)
        for mode in (1, 0, 1):
            drop.train(bool(mode))
            same_as_eager(call, model, model)
        assert graphs_compiled() == 1

    def test_what_draws_in_between_draws_as_in_eager(self):
        model = Then(lambda m, y: m.last(m.linear(y + torch.rand_like(y))))
        model.last = nn.Dropout(0.2)
        call = compiled(model)
        for vector in itertools.product([0, 1], repeat=2):
            put(model, vector)
            same_as_eager(call, model, model)
        assert graphs_compiled() == 1

    def test_inference_mode_before_training(self):
        model = Layers(1)
        call = compiled(model)
        with torch.inference_mode():
            call(X)
        same_as_eager(call, model, model)

    def test_sizes_of_nothing(self):
        model = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
        same_as_eager(compiled(model), model, model, torch.randn(0, 3))


def in_place(m, y):
    return y.add_(1)


def branches(m, y):
    return y + 1 if m.drop.training else y


def by_name(m, y):
    return y + 1 if getattr(m.drop, "training") else y  # noqa: B009


def by_dict(m, y):
    return y + 1 if m.drop.__dict__["training"] else y


def wakes(m, y):
    m.drop.train()
    return m.drop(y)


def over_children(m, y):
    for child in m.children():
        if child.training:
            y = y + 1
    return y


class Own(nn.Dropout):
    def forward(self, x):
        return super().forward(x) + (1 if self.training else 2)


class Counting(nn.Dropout):
    def extra(self):
        return 1 if self.training else 2


def _after_a_graph_break(m, y):
    torch._dynamo.graph_break()
    return m.again(m.linear(y))


def _in_a_region(m, y):
    with torch.no_grad():
        z = m.again(m.linear(y))
    return y + z


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")
class TestGuarded:
    """What Python reads, or what isn't a dropout, stays guarded: a graph for each mode, and right in each."""

    def flips(self, model, x=X, drop=None):
        call, drop = compiled(model), drop or model.drop
        for mode in (True, False, True, False):
            drop.train(mode)
            same_as_eager(call, model, model, x)

    @pytest.mark.parametrize("behind", [branches, by_name, by_dict, over_children])
    def test_code_that_decides_by_the_flag(self, behind):
        self.flips(Then(behind))
        assert graphs_compiled() == 2

    def test_code_that_sets_the_flag(self):
        model = Then(wakes)
        call = compiled(model)
        for mode in (True, False):
            model.drop.train(mode)
            torch.manual_seed(0)
            ours = call(X)
            model.drop.train(mode)
            torch.manual_seed(0)
            torch.testing.assert_close(ours, model(X))

    @pytest.mark.parametrize("layout", [lambda y: y * y.stride(0), lambda y: y * (2 if y.is_contiguous() else 3)])
    def test_code_that_decides_by_the_layout_of_a_result(self, layout):
        """Eval hands on an input with gaps in memory, train gives a result without."""

        class Sliced(Then):
            def forward(self, x):
                return layout(self.drop(self.linear(x)[:, ::2]))

        self.flips(Sliced(None))
        assert graphs_compiled() == 2

    def test_a_region_of_an_exported_module_guards_its_own_alone(self):
        class Net(Then):
            def __init__(self):
                super().__init__(None)
                self.inside = nn.Dropout(0.3)

            def forward(self, x):
                with torch.no_grad():
                    y = self.inside(x)
                return self.drop(self.linear(x)) * y

        model = Net()
        module = cm.bind(torch.export.export(model, (X,)))
        call = compiled(module)
        for mode in (True, False, True):
            module.drop.train(mode)
            model.drop.train(mode)
            same_as_eager(call, module, model)
        assert graphs_compiled() == 1

    def test_a_class_of_ones_own(self):
        self.flips(Then(lambda m, y: y, Own(0.3)))
        assert graphs_compiled() == 2

    def test_a_method_of_ones_own(self):
        self.flips(Then(lambda m, y: y * m.drop.extra(), Counting(0.3)))
        assert graphs_compiled() == 2

    def test_hooks(self):
        model = Then(lambda m, y: y)
        model.drop.register_forward_hook(lambda m, _, y: y + 1 if m.training else y)
        self.flips(model)
        assert graphs_compiled() == 2

    def test_functions_with_the_flag_of_their_module(self):
        model = Then(lambda m, y: F.dropout(y, 0.3, m.training))
        self.flips(model, drop=model)
        assert graphs_compiled() == 2

    def test_what_eval_mode_hands_on_and_the_graph_writes(self):
        def both(m, y):
            return m.again(y) + y.mul_(2)

        model = Then(both)
        model.again = nn.Dropout(0.5)
        self.flips(model, drop=model.again)

    def test_norms_are_named(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        eager, call = copy.deepcopy(model), compiled(model)
        with pytest.warns(ModeWarning, match=r"(?s)CM419.*batch_norm.*owner '1'"):
            same_as_eager(call, model, eager)
        for vector in itertools.product([True, False], repeat=2):
            for m in (model, eager):
                m[1].train(vector[0])
                m[2].train(vector[1])
            same_as_eager(call, model, eager)
            torch.testing.assert_close(model[1].running_mean, eager[1].running_mean)
        assert graphs_compiled() == 2

    def test_hard_coded_dropouts_of_a_bound_module(self):
        class Both(nn.Module):
            def forward(self, x):
                return F.dropout(F.dropout(x.tanh(), 0.3, self.training), 0.3, True)

        model = cm.export(Both(), (X,))
        call, eager = compiled(model), Both()
        for mode in (True, False):
            model.train(mode)
            eager.train(mode)
            same_as_eager(call, model, eager)

    @pytest.mark.parametrize("again", [_after_a_graph_break, _in_a_region])
    def test_graph_breaks_and_regions(self, again):
        model = Then(again)
        model.again = nn.Dropout(0.2)
        call = compiled(model)
        for vector in itertools.product([0, 1], repeat=2):
            put(model, vector)
            same_as_eager(call, model, model)

    def test_switches_are_refused_by_name(self):
        class Jitter(nn.Module):
            def forward(self, x):
                return (x * 2).tanh() if self.training else x

        program = cm.export(nn.Sequential(nn.Linear(16, 16), Jitter(), nn.Dropout(0.2)), (X,))
        assert any(site.op.family == "switch" for site in cm.sites(program))
        with pytest.raises(OptionError, match=r"(?s)CM127.*'1'"):
            compiled(program)(X)


@pytest.mark.parametrize("value", ["tensor", True, 1])
def test_only_data_is_a_value(value):
    with pytest.raises(OptionError, match="CM125"):
        torch.compile(Layers(1), backend="pt2e_modes", options={"modes": value})(X)


@pytest.mark.parametrize("asked", [{"training": True}, {"overrides": {"*": "eval"}}, {"freeze": "auto"}])
def test_modes_that_are_asked_for_are_no_data(asked):
    with pytest.raises(OptionError, match="CM126"):
        compiled(Layers(1), **asked)(X)


@pytest.mark.usefixtures("no_inductor")
def test_a_failure_of_inductor_leaves_the_guards(monkeypatch):
    from compile_modes import _compat

    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def fails_on_flags(gm, example_inputs):
        if any(node.name.startswith("mode_flags") for node in gm.graph.nodes):
            raise RuntimeError("no")
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr(_compat, "inductor", lambda mode, options: fails_on_flags)
    model = Layers(1)
    call = compiled(model)
    with pytest.warns(ModeWarning, match="CM412"):
        call(X)
    for mode in (0, 1, 0):
        put(model, [mode])
        same_as_eager(call, model, model)
    assert graphs_compiled() == 3  # two modes; and the first call, without gradients


@pytest.mark.slow
def test_what_may_not_be_written_stays_guarded():
    """In train, eager raises too."""
    model = nn.Sequential(nn.Tanh(), nn.Dropout(0.3, inplace=True)).eval()
    call = compiled(model)
    with pytest.warns(ModeWarning, match="CM412"):
        same_as_eager(call, model, model)


@pytest.mark.slow
@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("fallback", [True, False])
def test_with_inductor(fallback):
    from torch._inductor import config

    model = Layers()
    eager = copy.deepcopy(model)
    with config.patch(fallback_random=fallback):
        call = compiled(model)
        for vector in itertools.product([0, 1], repeat=6):
            put(model, vector)
            put(eager, vector)
            same_as_eager(call, model, eager)
    assert graphs_compiled() == 1
