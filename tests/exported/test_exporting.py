import copy
import random
import re
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compile_modes as cm
from compile_modes.graph.dual import DualModule
from exported.python_decides import (
    AlwaysOn,
    GaussianNoise,
    InvertedBeside,
    LayerDrop,
    OwnCounter,
    Reuse,
    Schedule,
    Weights,
)
from graphs import graphs_compiled
from nets import (
    IMAGE,
    TOKENS,
    VECTORS,
    Auxiliary,
    ConvNet,
    DropPath,
    EveryFlag,
    HardCoded,
    MixedMask,
    Parent,
    Residual,
    Sampler,
)  # fmt: skip
from oracle import agrees, same_outputs, same_state, text
from setups import nets

SINGLE = [
    *nets(),
    pytest.param(HardCoded, VECTORS, id="hard-coded"),
    pytest.param(EveryFlag, VECTORS, id="every-flag"),
    pytest.param(lambda: Reuse(), VECTORS, id="reuse"),
    pytest.param(lambda: nn.Sequential(nn.Linear(4, 4), GaussianNoise(True)), VECTORS, id="gaussian-noise"),
    pytest.param(lambda: nn.Sequential(OwnCounter(True), nn.Dropout(0.1)), VECTORS, id="counts-always"),
    pytest.param(lambda: nn.Sequential(OwnCounter(False), nn.Dropout(0.1)), VECTORS, id="normalises-always"),
    pytest.param(MixedMask, VECTORS, id="mixed-mask"),
    pytest.param(Sampler, VECTORS, id="sampler"),
    pytest.param(lambda: Residual(DropPath(0.3), DropPath(0.2, "floor")), IMAGE, id="drop-path"),
    pytest.param(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True), TOKENS, id="transformer"),
]


DUAL = [
    pytest.param(InvertedBeside, VECTORS, "the structure of the outputs", id="inverted"),
    pytest.param(Auxiliary, IMAGE, "the structure of the outputs", id="auxiliary"),
]
SWITCHED = [
    pytest.param(lambda: nn.Sequential(nn.Linear(4, 4), GaussianNoise(False)), VECTORS, {"1"}, id="eval-noise"),
    pytest.param(AlwaysOn, TOKENS, {""}, id="always-on"),
    pytest.param(LayerDrop, TOKENS, {""}, id="layer-drop"),
    pytest.param(Schedule, VECTORS, {""}, id="schedule"),
]


def both(build, x):
    reference, model = build(), build()
    model.load_state_dict(reference.state_dict())
    return reference, cm.export(model, (x,))


@pytest.mark.parametrize(("build", "x"), SINGLE)
@pytest.mark.every(4)
def test_one_graph_where_flags_suffice(build, x):
    reference, module = both(build, x)
    assert isinstance(module, torch.fx.GraphModule)
    agrees(reference, module, inputs=[x], tolerance=0.0)


@pytest.mark.every(2)
@pytest.mark.parametrize(("build", "x", "difference"), DUAL)
def test_two_graphs_where_python_decides(build, x, difference):
    reference, module = both(build, x)
    assert isinstance(module, DualModule)
    assert module.difference.startswith(difference)
    assert cm.explain(module).startswith(f"two programs, which differ in {difference}")
    agrees(reference, module, inputs=[x], tolerance=0.0)


@pytest.mark.every(2)
@pytest.mark.parametrize(("build", "x", "deciders"), SWITCHED)
def test_one_graph_with_switches_where_python_decides(build, x, deciders):
    reference, module = both(build, x)
    assert isinstance(module, torch.fx.GraphModule)
    assert {site.owner for site in cm.sites(module) if site.op.family == "switch"} == deciders
    agrees(reference, module, inputs=[x], tolerance=0.0)


@pytest.mark.parametrize(("build", "x"), [(Weights, TOKENS), *(p.values[:2] for p in (*DUAL, *SWITCHED))])
@pytest.mark.every(4)
def test_a_copy_flips_on_its_own(build, x):
    reference, module = both(build, x)
    copied = copy.deepcopy(module)
    agrees(copy.deepcopy(reference), copied.train(), inputs=[x], flips=1, tolerance=0.0)
    same_state(reference, module, 0.0)
    agrees(reference, module, inputs=[x], flips=1, tolerance=0.0)


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.net.block1.bn.eval(),
        lambda m: m.net.eval(),
        lambda m: (m.net.drop.train(), m.net.block2.train()),
        lambda m: m.aux.eval(),
    ],
    ids=["frozen-bn", "frozen-net", "woken", "frozen-head"],
)
@pytest.mark.every(4)
def test_submodules_have_modes_in_both_programs(touch):
    reference, module = both(Auxiliary, IMAGE)
    agrees(reference, module, inputs=[IMAGE], touch=touch, tolerance=0.0)


def test_attention_dropout_is_known_to_the_eval_program():
    reference, module = both(LayerDrop, TOKENS)
    agrees(reference, module, inputs=[TOKENS], touch=lambda m: m.first.train(), tolerance=0.0)
    sites = [site for site in cm.sites(module) if site.op.family == "attention"]
    assert [(site.owner, site.p) for site in sites] == [("first", 0.3), ("second", 0.4)]


def test_both_programs_have_the_mode_of_the_root():
    _, module = both(Auxiliary, IMAGE)
    for mode in (False, True):
        module.train(mode)
        assert [module.program(which).training for which in (True, False)] == [mode, mode]


def test_the_module_starts_in_the_modes_of_the_model_and_leaves_them():
    model = Auxiliary().eval()
    model.net.block1.train()
    before = {name: module.training for name, module in model.named_modules()}
    module = cm.export(model, (IMAGE,))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: module.get_submodule(name).training for name in before} == before


@pytest.mark.parametrize(("build", "x"), [(ConvNet, IMAGE), (Auxiliary, IMAGE)])
def test_state_is_shared_never_copied(build, x):
    model = build()
    module = cm.export(model, (x,))
    assert module.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert module.state_dict(keep_vars=True)[name] is tensor, name
    other = build()
    module.load_state_dict(other.state_dict(), assign=True)
    for mode in (True, False):
        same_outputs(other.train(mode), module.train(mode), x)


@pytest.mark.every(2)
@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
def test_root_state_can_be_replaced_in_both_programs(copied):
    reference, module = both(Auxiliary, IMAGE)
    module = copy.deepcopy(module) if copied else module
    for m in (reference, module):
        m.double()
        m.scale = nn.Parameter(torch.full((5,), 2.0, dtype=torch.float64))
        m.shift = torch.full((5,), 3.0, dtype=torch.float64)
    for mode in (True, False):
        same_outputs(reference.train(mode), module.train(mode), IMAGE.double())


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize(("build", "x"), [(Auxiliary, IMAGE), (lambda: Residual(DropPath(0.3)), IMAGE)])
@pytest.mark.every(6)
def test_compiled(build, x, nested):
    reference, module = both(build, x)
    if nested:
        parent = Parent(reference)
        module = Parent(module)
        module.stem.load_state_dict(parent.stem.state_dict())
        reference = parent
    agrees(reference, module, torch.compile(module, backend="pt2e_modes"), [x])
    assert graphs_compiled() == 2


@pytest.mark.usefixtures("no_inductor")
def test_overrides_reach_both_programs():
    reference, module = both(Auxiliary, IMAGE)
    compiled = torch.compile(module, backend="pt2e_modes", options={"overrides": {"net.block*.bn": "eval"}})
    agrees(reference, module, compiled, [IMAGE], touch=lambda m: [b.bn.eval() for b in (m.net.block1, m.net.block2)])


def test_dynamic_shapes():
    batch = torch.export.Dim("batch", min=2)
    for build, x in [(ConvNet, IMAGE), (Auxiliary, IMAGE), (lambda: Residual(DropPath(0.3)), IMAGE)]:
        reference, model = build(), build()
        model.load_state_dict(reference.state_dict())
        module = cm.export(model, (x,), dynamic_shapes=({0: batch},))
        for size in (3, 5):
            agrees(reference, module, inputs=[torch.randn(size, *x.shape[1:])], flips=1, tolerance=0.0)


def test_keyword_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.3)

        def forward(self, x, *, scale):
            return self.drop(x * scale)

    module = cm.export(Net(), (VECTORS,), {"scale": torch.tensor(2.0)})
    for mode in (True, False):
        same_outputs(Net().train(mode), module.train(mode), VECTORS, scale=torch.tensor(3.0))


class Freezing(nn.Module):
    """Its train() leaves a part in eval, whatever its flag was."""

    def __init__(self):
        super().__init__()
        self.back, self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), GaussianNoise(True)), nn.Linear(4, 4)
        self.noise = GaussianNoise(True)

    def train(self, mode=True):
        super().train(mode)
        self.back.eval()
        return self

    def forward(self, x):
        return self.head(self.noise(self.back(x)))


@pytest.mark.parametrize("fresh", [True, False])
def test_what_the_models_train_leaves_in_eval_stays_there_and_is_named(fresh):
    reference = Freezing()
    model = copy.deepcopy(reference) if fresh else copy.deepcopy(reference).train()
    with pytest.warns(cm.ModeWarning, match="CM325: train.. and eval.. of Freezing leave 'back', 'back.0', 'back.1'"):
        module = cm.export(model, (VECTORS,))
    agrees(reference.train(), module.train(), inputs=[VECTORS], touch=lambda m: m.train(), tolerance=0.0)


def test_a_model_whose_train_changes_its_weights_is_refused():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def train(self, mode=True):
            if mode is not self.training:
                self.w.data.mul_(2.0 if mode else 0.5)
            return super().train(mode)

        def forward(self, x):
            return x * self.w if self.training else x * self.w * 2

    model = Merging().eval()
    weights = model.w.clone()
    with pytest.raises(cm.ExportError, match="the state of the model changes with its mode"):
        cm.export(model, (VECTORS,))
    assert not model.training
    assert torch.equal(model.w, weights)


def test_inverted_flags_survive_bake():
    class Inverted(nn.Module):
        def forward(self, x):
            return F.dropout(F.dropout(x, 0.3, not self.training), 0.2)

    module = cm.export(nn.Sequential(nn.Linear(4, 4), Inverted(), nn.Dropout(0.1)), (VECTORS,))
    expected = copy.deepcopy(module)
    assert "flag, inverted" in cm.explain(module)
    for mode in (True, False):
        same_outputs(expected.train(mode), cm.bake(copy.deepcopy(module), mode), VECTORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.ModeWarning)
        again = cm.bind(cm.bake(copy.deepcopy(module.train()), True))
    for mode in (True, False):
        same_outputs(expected.train(mode), again.train(mode), VECTORS)


def test_a_failing_train_export_is_reported_with_its_cause():
    class Failing(nn.Module):
        def forward(self, x):
            return x * float(x.sum()) if self.training and x.sum() > 0 else x

    model = Failing().eval()
    with pytest.raises(cm.ExportError, match=r"the train export failed: .*\n.*\n.*model.train\(\)") as caught:
        cm.export(model, (VECTORS,))
    assert caught.value.__cause__ is not None
    assert not model.training
    assert re.search(r"where: Failing \(test_exporting.py:\d+\)\n", str(caught.value))
    with pytest.raises(cm.ExportError, match=r"where: Sequential, in '1' \(test_exporting.py:\d+\)\n"):
        cm.export(nn.Sequential(nn.Linear(4, 4), Failing()), (VECTORS,))


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand], ids=["random", "numpy"])
def test_numbers_that_are_not_torchs_are_refused(draw):
    class Dropped(nn.Module):
        def forward(self, x):
            return x if self.training and draw() < 0.5 else x.tanh()

    random.seed(0)
    numpy.random.seed(0)
    expected = draw()
    random.seed(0)
    numpy.random.seed(0)
    name = "Python's random" if draw is random.random else "NumPy"
    with pytest.raises(cm.ExportError, match=f"^CM323: the train export of the model drew random numbers from {name}"):
        cm.export(Dropped(), (VECTORS,))
    assert draw() == expected


def test_the_function_whose_backward_is_lost_is_named():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Binarize(nn.Module):
        def forward(self, x):
            return Sign.apply(x)

    with pytest.raises(cm.ExportError, match=r"^CM324: .*the autograd.Function 'Sign'.*\n  where: sign \(owner '1'\)"):
        cm.export(nn.Sequential(nn.Linear(4, 4), Binarize()), (VECTORS,))


@pytest.mark.parametrize("thing", ["exported", "model", None])
def test_what_is_no_eager_module_is_refused(thing):
    thing = torch.export.export(ConvNet(), (IMAGE,)).module() if thing == "exported" else thing
    with pytest.raises(cm.ExportError, match="is not an eager module"):
        cm.export(thing, (IMAGE,))


def test_hard_coded_and_inverted_flags_are_told_apart():
    _, module = both(EveryFlag, VECTORS)
    shown = [(site.op.family, site.bound, site.hard_coded, site.inverted, site.p) for site in cm.sites(module)]
    assert shown == [
        ("dropout", True, False, False, 0.1),
        ("dropout", False, True, False, 0.2),
        ("dropout", False, True, False, 0.3),
        ("dropout", True, False, True, 0.15),
        ("dropout", True, False, False, 0.25),
        ("noise", True, False, False, None),
        ("attention", True, False, True, 0.3),
    ]
    before = text(module)
    assert cm.bind(module) is module
    assert text(module) == before
    assert not module.eval().training
    assert [site.training for site in cm.sites(module)] == [False, True, False, True, False, False, True]


def test_modules_of_two_programs_are_refused_where_one_graph_is_needed():
    _, module = both(Auxiliary, IMAGE)
    assert cm.bind(module) is module
    for call in (lambda: cm.set_mode(module, True), lambda: cm.bake(module)):
        with pytest.raises(cm.BindError, match=r"two programs.*\n.*program\(True\)"):
            call()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.every(2)
def test_modules_of_two_programs_export_again(mode):
    reference, module = both(Auxiliary, IMAGE)
    again = torch.export.export(module.train(mode), (IMAGE,)).module()
    same_outputs(reference.train(mode), again, IMAGE)


class Named(nn.Module):
    """Has a buffer, a parameter or a child of a name, beside a dropout."""

    def __init__(self, kind, name):
        super().__init__()
        self.name, self.fc, self.drop = name, nn.Linear(4, 4), nn.Dropout(0.5)
        if kind == "submodule":
            self.add_module(name, nn.Linear(4, 4))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(torch.ones(4)))
        else:
            self.register_buffer(name, torch.ones(4))

    def forward(self, x):
        named = getattr(self, self.name)
        return self.drop(named(self.fc(x)) if isinstance(named, nn.Module) else named * self.fc(x))


def test_parameters_made_for_inference_are_refused_by_name():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(cm.ExportError, match=r"^CM328: the parameters '0.weight', '0.bias' are inference tensors"):
        cm.export(model, (torch.randn(2, 4),))


@pytest.mark.parametrize("kind", ["buffer", "parameter", "submodule"])
@pytest.mark.parametrize("name", ["code", "graph", "meta", "shape_env", "recompile"])
@pytest.mark.every(2)
def test_names_that_torch_has_taken_are_refused_by_name(kind, name):
    model = Named(kind, name)
    with pytest.raises((KeyError, RuntimeError)):  # torch: what is wrong here is its own
        torch.export.export(model, (VECTORS,)).module()(VECTORS)
    with pytest.raises(cm.ExportError, match=rf"^CM322: .* the {kind} '{name}' of the model"):
        cm.export(model, (VECTORS,))
    outer = nn.Sequential(model)  # where all names are free
    agrees(copy.deepcopy(outer), cm.export(outer, (VECTORS,)), inputs=[VECTORS], flips=1, tolerance=0.0)


def test_so_is_a_module_with_a_mode_of_such_a_name():
    model = Named("parameter", "scale")
    model.meta, model.drop = nn.Dropout(0.5), nn.Identity()
    model.register_forward_hook(lambda module, args, output: module.meta(output))
    with pytest.raises(cm.BindError, match=r"^CM204: .*\n  where: owner 'meta', attribute 'meta'"):
        cm.export(model, (VECTORS,))
