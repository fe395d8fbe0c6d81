import copy
import warnings

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes.graph.calls import GATES
from graphs import graphs_compiled
from nets import IMAGE, DropBlock, DropPath, MixedMask, Residual, Sampler
from oracle import agrees, same_outputs, same_steps, text

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class Shared(nn.Module):
    """One DropPath called twice."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = DropPath(0.3)

    def forward(self, x):
        return self.drop(self.fc(self.drop(x)))


def hooked():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5), n_power_iterations=2), nn.Dropout(0.2))


def parametrized():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5), n_power_iterations=2)
    return nn.Sequential(layer, nn.Dropout(0.2))


MODELS = [
    pytest.param(lambda: Residual(DropPath(0.3), DropPath(0.4, "floor")), IMAGE, "noise", id="drop-path"),
    pytest.param(lambda: nn.Sequential(nn.Linear(4, 4), DropPath(0.3, "after")), X, "noise", id="scaled-after"),
    pytest.param(lambda: Residual(DropBlock(), nn.Dropout(0.1)), IMAGE, "noise", id="drop-block"),
    pytest.param(Shared, X, "noise", id="shared"),
    pytest.param(hooked, X, "spectral_norm", id="spectral-norm-hook"),
    pytest.param(parametrized, X, "spectral_norm", id="spectral-norm-parametrization"),
]

DYNAMIC = [
    *(pytest.param(*model.values[:2], id=model.id) for model in MODELS[:4]),
    pytest.param(lambda: Residual(DropBlock(), DropBlock(), DropPath(0.2, "floor")), IMAGE, id="three-masks"),
]


def both(build, x, start=True):
    reference, model = build(), build()
    model.load_state_dict(reference.state_dict())
    return reference, cm.bind(torch.export.export(model.train(start), (x,)))


@pytest.mark.parametrize(("build", "x", "family"), MODELS)
def test_a_train_export_switches_both_ways(build, x, family):
    reference, bound = both(build, x)
    assert family in {site.op.family for site in cm.sites(bound)}
    assert all(site.bound for site in cm.sites(bound))
    agrees(reference, bound, inputs=[x], tolerance=0.0)


@pytest.mark.parametrize(("build", "x", "family"), MODELS)
def test_copies_reexports_and_baked_graphs_are_right_too(build, x, family):
    _, bound = both(build, x)
    copied = copy.deepcopy(bound)
    again = cm.bind(torch.export.export(bound.train(), (x,)))
    for module in (copied, again):
        expected = build()
        expected.load_state_dict(module.state_dict())
        agrees(expected, module, inputs=[x], flips=1, tolerance=0.0)
    for mode in (True, False):
        baked = cm.bake(copy.deepcopy(bound), mode)
        assert not [node for node in baked.graph.nodes if node.target in GATES]
        plain = build().train(mode)
        plain.load_state_dict(baked.state_dict())
        same_outputs(plain, baked, x)


@pytest.mark.parametrize(("build", "x", "family"), MODELS)
def test_set_mode_round_trips_change_nothing(build, x, family):
    graph = torch.export.export(build(), (x,)).module()
    first = cm.set_mode(graph, False)
    assert not first.refused
    shown = text(graph)
    assert len(cm.set_mode(graph, True).changed) == len(first.changed)
    assert cm.set_mode(graph, False).refused == ()
    assert text(graph) == shown
    expected = build().eval()
    expected.load_state_dict(graph.state_dict())
    same_outputs(expected, graph, x)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(("build", "x", "family"), MODELS)
@pytest.mark.every(2)
def test_compiled(build, x, family):
    reference, bound = both(build, x)
    agrees(reference, bound, torch.compile(bound, backend="pt2e_modes"), [x])
    assert graphs_compiled() == 2


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(("build", "x"), [m.values[:2] for m in MODELS[:4]], ids=[m.id for m in MODELS[:4]])
def test_the_backend_forces_masks_of_eager_models_off(build, x):
    model = build()
    compiled = torch.compile(model, backend="pt2e_modes", options={"training": False})
    expected = build().eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(x), expected(x))


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(("build", "x"), DYNAMIC)
@pytest.mark.every(6)
def test_sizes_that_a_mask_is_computed_with_may_be_dynamic(build, x):
    reference, model = build(), build()
    model.load_state_dict(reference.state_dict())
    compiled = torch.compile(model.train(), backend="pt2e_modes", options={"training": False}, dynamic=True)
    reference.eval()
    for size in (5, 3):
        torch.testing.assert_close(compiled(x[:size].clone()), reference(x[:size]))


@pytest.mark.parametrize(("build", "x"), DYNAMIC)
def test_dynamic_exports_switch(build, x):
    reference, model = build(), build()
    model.load_state_dict(reference.state_dict())
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    bound = cm.bind(program)
    assert all(site.bound for site in cm.sites(bound))
    for size in (5, 3):
        agrees(reference, bound, inputs=[x[:size]], flips=1, tolerance=0.0)
    graph = program.module()
    assert not cm.set_mode(graph, False).refused
    reference.eval()
    same_outputs(reference, graph, x[:5])


def test_no_random_numbers_are_drawn_in_eval():
    _, bound = both(lambda: Residual(DropPath(0.3)), IMAGE)
    bound.eval()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    bound(IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    bound.get_submodule("drops.0").train()
    bound(IMAGE)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_bound_graph_of_a_mask():
    _, bound = both(lambda: nn.Sequential(nn.Linear(4, 4), DropPath(0.25)), X)
    assert_expected_inline(
        text(bound),
        """\
v0 = aten.linear.default(input, 0.weight, 0.bias)
v1 = noise(1.training, 1, _noise_0, v0)
v2 = getitem(v1, 0)
return (v2)
v0 = aten.new_empty.default(linear, (6, 1), pin_memory=False)
v1 = aten.bernoulli_.float(v0, 0.75)
v2 = aten.div_.Tensor(v1, 0.75)
v3 = aten.mul.Tensor(linear, v2)
return (v3)""",
    )


@pytest.mark.parametrize("build", [hooked, parametrized])
def test_spectral_norm_exported_in_eval_is_refused(build):
    program = torch.export.export(build().eval(), (X,))
    assert "not to train (CM705): spectral norm's power iteration is not in an eval export" in cm.explain(program)
    with pytest.warns(cm.ModeWarning, match="power iteration is not in an eval export"):
        bound = cm.bind(program)
    assert not any(site.bound for site in cm.sites(bound) if site.op.family == "spectral_norm")
    report = cm.set_mode(program.module(), True)
    assert [site.op.family for site, _ in report.refused] == ["spectral_norm"]


@pytest.mark.parametrize("build", [hooked, parametrized])
def test_no_dropout_can_be_supplied_to_spectral_norm(build):
    with pytest.raises(cm.OverrideError, match="matches no attention or functional dropout site"):
        cm.bind(torch.export.export(build().eval(), (X,)), dropout_p={"*": 0.1})


@pytest.mark.usefixtures("no_inductor")
def test_a_power_iteration_that_cannot_be_taken_out_is_an_error():
    compiled = torch.compile(parametrized(), backend="pt2e_modes", options={"training": False})
    with pytest.raises(cm.OverrideError, match="power iteration is not in a no_grad region of its own"):
        compiled(X)


@pytest.mark.parametrize("start", [True, False])
def test_random_numbers_of_both_modes_stay(start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.ModeWarning)  # a train export can't tell
        reference, bound = both(Sampler, X, start)
    assert "in both modes: aten.randn_like.default draws random numbers (owner '')" in cm.explain(bound)
    agrees(reference, bound, inputs=[X], tolerance=0.0)


def test_a_mask_that_may_have_no_mode_is_named():
    program = torch.export.export(MixedMask(), (X,))
    with pytest.warns(cm.ModeWarning, match=r"random numbers of '' are drawn in both modes.*\n.*compile_modes.export"):
        bound = cm.bind(program)
    assert "in both modes: aten.bernoulli_.float draws random numbers (owner '')" in cm.explain(bound)
    cm.bind(program, keep=[""])  # says that it knows, and is not warned


class PatchDropout(nn.Module):
    """Random numbers that are no mask: in train, half of the patches are left out (timm's patch_dropout)."""

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.randn(x.shape[:2]).argsort(-1)[:, : x.shape[1] // 2]
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))


def test_random_numbers_that_are_no_mask_are_named():
    model = nn.Sequential(nn.Linear(4, 4), PatchDropout(), nn.Dropout(0.1))
    program = torch.export.export(model, (IMAGE[0, :, :, :4],))
    with pytest.warns(cm.ModeWarning, match=r"random numbers of '1' are drawn in both modes.*\n.*compile_modes.export"):
        bound = cm.bind(program)
    assert "in both modes: aten.randn.default draws random numbers (owner '1')" in cm.explain(bound)
    program = torch.export.export(model.eval(), (IMAGE[0, :, :, :4],))
    with pytest.warns(cm.ModeWarning, match=r"'1' left nothing in the eval export: .*\n.*compile_modes.export"):
        bound = cm.bind(program)
    assert "'1' left nothing in the eval export" in cm.explain(bound)
    assert "'1'" not in cm.explain(cm.bind(program, keep=["1"]))


class AlwaysNoise(nn.Module):
    """Noise in both modes, in a module of its own."""

    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.added else x * torch.empty_like(x).bernoulli_(0.5)


@pytest.mark.parametrize(("added", "start"), [(True, True), (True, False), (False, False)])
def test_noise_of_both_modes_stays(added, start):
    def build():
        return nn.Sequential(nn.Linear(4, 4), AlwaysNoise(added), nn.Dropout(0.2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cm.ModeWarning)  # a train export can't tell
        reference, bound = both(build, X, start)
    agrees(reference, bound, inputs=[X], tolerance=0.0)


def test_writes_of_both_modes_are_listed():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return self.drop(x - self.mean)

    with pytest.warns(cm.ModeWarning, match=r"^CM240: 'mean' are written"):
        reference, bound = both(Average, X)
    assert "in both modes: aten.mul_.Tensor writes the buffer 'mean' (owner '')" in cm.explain(bound)
    for mode in (True, False, True):
        reference.train(mode), bound.train(mode)
        same_steps(reference, bound, inputs=[X], steps=1, train=False, tolerance=0.0)
