"""More combinations of modes than Dynamo's cache has room for."""

import copy
import gc
import re
import warnings
import weakref

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes import _compat
from graphs import graphs_compiled
from oracle import same_gradients, same_outputs, same_step, seeded, sgd


class Layers(nn.Module):
    """Unfrozen layer by layer."""

    def __init__(self, depth=6):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.layers = nn.ModuleList([*(nn.Dropout(0.1) for _ in range(depth - 1)), nn.BatchNorm1d(3)])

    def forward(self, x):
        x = self.fc(x)
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(5, 3)
LIMIT, VECTORS = 4, 7


@pytest.fixture(autouse=True)
def _small_limit():
    """Half of Dynamo's own limit, and half as many layers to reach it."""
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


def unfreeze(model, layers):
    """Mode vector number ``layers``: the last so many layers train."""
    model.train()
    children = [model.layers.get_submodule(str(i)) for i in range(len(list(model.layers.children())))]
    for layer in children[: len(children) - layers]:
        layer.eval()


def call(compiled, model, vector, x=X):
    """Runs a vector; returns how many graphs it took."""
    before = graphs_compiled()
    unfreeze(model, vector)
    compiled(x)
    return graphs_compiled() - before


@pytest.fixture
def artefacts(monkeypatch):
    """Weak references to what a compiler has returned, in order; each counts its calls."""
    made = []

    class Artefact:
        def __init__(self, function):
            self.function, self.calls = function, 0

        def __call__(self, *args):
            self.calls += 1
            return self.function(*args)

    def inductor(mode, options):
        def compile_fx(gm, example_inputs):
            artefact = Artefact(gm.forward)
            made.append(weakref.ref(artefact))
            return artefact

        return compile_fx

    monkeypatch.setattr(_compat, "inductor", inductor)
    return made


def alive(artefacts):
    gc.collect()
    return [i for i, ref in enumerate(artefacts) if ref() is not None]


def same_as_eager(reference, compiled, model, vectors):
    """Trains a little under each vector and compares everything with eager."""
    optimizers = sgd(reference, model)
    for vector in vectors:
        unfreeze(reference, vector), unfreeze(model, vector)
        same_step(reference, model, compiled, [X], optimizers=optimizers, seed=vector, tolerance=1e-5)


def test_stock_dynamo_runs_eager_beyond_its_limit(artefacts):
    """The problem: it compiles as many vectors as fit, and the others run uncompiled for ever."""
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.ModeWarning)
        took = [call(compiled, model, vector) for vector in range(VECTORS)]
    assert took == [1] * LIMIT + [0] * (VECTORS - LIMIT)
    calls = sum(ref().calls for ref in artefacts)
    assert call(compiled, model, VECTORS - 1) == 0
    assert sum(ref().calls for ref in artefacts) == calls == LIMIT


@pytest.mark.parametrize(
    ("kind", "keep"),
    [
        ("eager", 1),
        pytest.param("bound", 3, marks=pytest.mark.slow),
        pytest.param("in place", 20, marks=pytest.mark.slow),
    ],
)
def test_all_vectors_are_compiled(kind, keep, artefacts):
    reference = Layers()
    model = copy.deepcopy(reference)
    if kind == "bound":
        model = cm.bind(torch.export.export(model, (X,)))
    compiled = model
    if kind == "in place":
        model.compile(backend="pt2e_modes", options={"mode_vectors": keep}, fullgraph=True)
    else:
        compiled = torch.compile(model, backend="pt2e_modes", options={"mode_vectors": keep}, fullgraph=True)
    same_as_eager(reference, compiled, model, range(VECTORS))
    assert graphs_compiled() == VECTORS
    assert alive(artefacts) == list(range(VECTORS))[-keep:]
    same_as_eager(reference, compiled, model, range(VECTORS))
    assert graphs_compiled() == (VECTORS if keep == 20 else 2 * VECTORS)
    assert len(alive(artefacts)) == min(keep, VECTORS)


def test_the_least_recently_used_goes_first(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes", options={"mode_vectors": 3})
    assert [call(compiled, model, v) for v in (0, 1, 2)] == [1, 1, 1]
    assert [call(compiled, model, v) for v in (0, 2, 0)] == [0, 0, 0]
    assert call(compiled, model, 3) == 1  # instead of 1
    assert alive(artefacts) == [0, 2, 3]
    assert [call(compiled, model, v) for v in (2, 0, 3)] == [0, 0, 0]
    assert call(compiled, model, 1) == 1  # instead of 2
    assert alive(artefacts) == [0, 3, 4]
    assert [call(compiled, model, v) for v in (0, 3, 1)] == [0, 0, 0]


def test_backward_outlives_eviction(artefacts):
    reference = Layers()
    model = copy.deepcopy(reference)
    compiled = torch.compile(model, backend="pt2e_modes", options={"mode_vectors": 1})
    outputs = []
    for m, f in ((reference, reference), (model, compiled)):
        unfreeze(m, 4)
        outputs.append(seeded(f, X))
    call(compiled, model, 0)  # another would write to statistics that backward needs
    assert alive(artefacts) == [1]
    for y in outputs:
        y.square().sum().backward()
    same_gradients(reference, model, 1e-5)


@pytest.mark.slow
def test_a_frame_that_runs_an_evicted_entry_finishes(artefacts):
    class Recursive(Layers):
        def forward(self, x, again=True):
            x = super().forward(x)  # the recursion below evicts the entry that runs
            if again:
                torch._dynamo.graph_break()
                self.layers[0].train(not self.layers[0].training)
                x = x + self(x, False)
            return x * 2

    model = Recursive(2)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="pt2e_modes", options={"mode_vectors": 1})
    same_outputs(reference, compiled, X, seeds=4, tolerance=1e-5)


def test_shapes_and_grad_modes_of_a_vector_stay_together(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes", dynamic=False, options={"mode_vectors": 2})

    def sizes(vector):
        return [call(compiled, model, vector, torch.randn(n, 3)) for n in range(2, 2 + LIMIT)]

    assert sizes(0) == sizes(1) == [1] * LIMIT
    assert sizes(0) == sizes(1) == [0] * LIMIT
    assert call(compiled, model, 1, torch.randn(40, 3)) == 1  # instead of the size used least recently
    assert call(compiled, model, 1, torch.randn(2, 3)) == 1
    assert call(compiled, model, 1, torch.randn(1 + LIMIT, 3)) == 0
    assert sizes(0) == [0] * LIMIT
    assert call(compiled, model, 2) == 1  # instead of all of 1
    assert len(alive(artefacts)) == LIMIT + 1


def test_other_compilations_of_the_function_are_left_alone(artefacts):
    model = Layers()
    stock = torch.compile(model, backend="aot_eager")
    one, two = (torch.compile(model, backend="pt2e_modes", options={"mode_vectors": n}) for n in (1, 2))
    assert [call(f, model, 0) for f in (stock, one, two)] == [1, 1, 1]
    assert [call(one, model, v) for v in (1, 2, 3)] == [1, 1, 1]
    assert [call(f, model, 0) for f in (stock, two, one)] == [0, 0, 1]


def test_models_that_share_a_function_of_dynamo_do_not_compete(artefacts):
    models = [nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), *(nn.ReLU() for _ in range(i))) for i in range(3)]
    compiled = [torch.compile(m, backend="pt2e_modes", options={"mode_vectors": 2}) for m in models]
    for _ in range(2):
        for model, f in zip(models, compiled, strict=True):
            for mode in (True, False):
                model.train(mode)
                f(X)
    assert graphs_compiled() == 6


def text_of(caught):
    return re.sub(r"\(/\S+/(\w+\.py):\d+\)", r"(\1:LINE)", str(caught.message))


def test_what_it_says_when_the_last_slot_is_taken(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes")
    for vector in range(LIMIT - 1):
        call(compiled, model, vector)
    with pytest.warns(cm.ModeWarning) as caught:
        assert [call(compiled, model, vector) for vector in (LIMIT - 1, LIMIT)] == [1, 0]
    (message,) = [text_of(c) for c in caught if issubclass(c.category, cm.ModeWarning)]
    assert_expected_inline(
        message,
        """\
CM416: forward (test_mode_vectors.py:LINE) is now compiled for 4 combinations of modes, and Dynamo has no room for more:
the next new one runs in eager mode, or raises if fullgraph=True.
  what to do: raise torch._dynamo.config.recompile_limit (4), or pass options={"mode_vectors": N},
  which keeps the N combinations that were used last, and compiles others again""",
    )


def test_it_counts_for_the_limit_in_force(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes")
    with torch._dynamo.config.patch(recompile_limit=3):
        call(compiled, model, 0)
        call(compiled, model, 1)
        with pytest.warns(cm.ModeWarning, match=r"3 combinations of modes[^$]*recompile_limit \(3\)"):
            call(compiled, model, 2)
    with torch._dynamo.config.patch(recompile_limit=20):
        model = Layers()
        compiled = torch.compile(model, backend="pt2e_modes")
        assert sum(call(compiled, model, v) for v in range(3, VECTORS)) == VECTORS - 3


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.compile has no such arguments")
def test_limits_and_caches_of_one_call_of_compile(artefacts):
    model = Layers()
    one = torch.compile(model, backend="pt2e_modes", isolate_recompiles=True, recompile_limit=3)
    two = torch.compile(model, backend="pt2e_modes", isolate_recompiles=True, options={"mode_vectors": 2})
    assert [call(one, model, v) for v in (0, 1)] == [1, 1]
    with pytest.warns(cm.ModeWarning, match="for 3 combinations"):
        call(one, model, 2)
    assert [call(two, model, v) for v in (0, 1, 2, 0, 2)] == [1, 1, 1, 1, 0]
    assert [call(one, model, v) for v in (0, 1, 2)] == [0, 0, 0]


def test_fullgraph_still_raises(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.ModeWarning)
        for vector in range(LIMIT):
            call(compiled, model, vector)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        call(compiled, model, LIMIT)


def test_shapes_are_not_modes(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes", dynamic=False)
    for size in range(2, 4 + LIMIT):  # pytest makes an error of the warning
        call(compiled, model, size % 2, torch.randn(size, 3))


def test_what_it_says_when_nothing_more_will_be_compiled(artefacts):
    model = Layers()
    compiled = torch.compile(model, backend="pt2e_modes", options={"mode_vectors": 2})
    with torch._dynamo.config.patch(accumulated_recompile_limit=5):
        for vector in range(4):
            call(compiled, model, vector)
        with pytest.warns(cm.ModeWarning) as caught:
            call(compiled, model, 4)
        assert call(compiled, model, 5) == 0
    assert_expected_inline(
        text_of(caught[0]),
        """\
CM417: forward (test_mode_vectors.py:LINE) has been compiled 5 times, and Dynamo compiles no function more often:
new combinations of modes run in eager mode.
  what to do: raise the option mode_vectors or torch._dynamo.config.accumulated_recompile_limit""",
    )


@pytest.mark.parametrize("value", [0, -1, True, "4", 2.0])
def test_bad_values(value, artefacts):
    with pytest.raises(cm.OptionError, match="mode_vectors is"):
        torch.compile(Layers(), backend="pt2e_modes", options={"mode_vectors": value})(X)
