"""What people do with a model that they train, each on compiled modules whose flags flip, beside eager ones."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import compile_modes as cm
from composition.models import KINDS, Net, X, bound, make
from graphs import graphs_compiled
from oracle import agrees, same_state, same_step, same_steps
from setups import compile_

pytestmark = pytest.mark.usefixtures("no_inductor")


def in_step(pairs, optimizers, *, rounds=1, after=lambda: None):
    """Trains pairs of (module, call) for two steps per round, and compares their outputs in both modes."""
    (reference, oracle), (module, call) = pairs
    for _ in range(rounds):
        for mode in (True, False):
            reference.train(mode), module.train(mode)
            for seed in range(2):
                trained = optimizers if mode else None
                same_step(reference, module, call, [X], oracle=oracle, optimizers=trained, seed=seed, tolerance=1e-5)
                if mode:
                    after()


@KINDS
@pytest.mark.parametrize(
    "use_buffers", [pytest.param(False, marks=pytest.mark.slow), True], ids=["weights", "weights-and-buffers"]
)
def test_an_averaged_copy_is_evaluated_while_the_model_trains(kind, use_buffers):
    reference, module = make(kind)
    averages = [
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers) for m in (reference, module)
    ]
    assert averages[1].module is not module
    averages[1].module.compile(backend="pt2e_modes")
    pairs = [(reference, reference), (module, compile_(module))]
    evaluations = []

    def evaluate():
        for m, average in zip((reference, module), averages, strict=True):
            average.update_parameters(m)
            assert m.training
        evaluations.append([average.eval()(X) for average in averages])  # the models stay in train

    in_step(pairs, [torch.optim.SGD(m.parameters(), lr=0.2) for m, _ in pairs], after=evaluate)
    for expected, found in evaluations:
        torch.testing.assert_close(found, expected)
    same_state(*averages, 1e-5)
    assert not torch.equal(evaluations[0][0], evaluations[-1][0])


@pytest.mark.slow
def test_update_bn_on_an_averaged_eager_model_that_is_compiled():
    reference, module = make("eager")
    averages = [AveragedModel(m) for m in (reference, module)]
    for average, call in zip(averages, (averages[0], compile_(averages[1])), strict=True):
        torch.manual_seed(0)
        update_bn([X[:2], X[2:], X + 1], call)
        assert average.module.block1.bn.momentum == 0.2
    same_state(*averages, 1e-5)
    assert averages[1].module.block1.bn.num_batches_tracked == 3


def test_update_bn_finds_no_batch_norm_in_an_exported_model_so_the_eager_model_lends_its_own():
    """As with stock torch, whose exported modules have no BatchNorm either; what it gives to eager ones fits them."""
    reference, module = make("bound")
    stock = torch.export.export(Net(), (X,)).module()
    for m in (stock, module):
        before = copy.deepcopy(m.state_dict())
        update_bn([X, X + 1], m)
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    twin = copy.deepcopy(reference)
    for m in (reference, twin):
        torch.manual_seed(0)
        update_bn([X, X + 1], m)
    module.load_state_dict(twin.state_dict())
    agrees(reference, module, compile_(module), [X], flips=1)


@KINDS
def test_assigned_weights_are_the_compiled_module_s_own(kind):
    reference, module = make(kind)
    compiled = compile_(module)
    agrees(reference, module, compiled, [X], flips=1)
    graphs = graphs_compiled()
    new = type(reference)().state_dict()
    reference.load_state_dict(copy.deepcopy(new))
    given = copy.deepcopy(new)
    module.load_state_dict(given, assign=True)
    agrees(reference, module, compiled, [X], flips=1)
    assert graphs_compiled() == graphs == 2
    assert module.block1.bn.running_mean is given["block1.bn.running_mean"]
    assert not torch.equal(given["block1.bn.running_mean"], new["block1.bn.running_mean"])


@pytest.mark.parametrize("kind", ["eager", "bound"])
def test_assigned_counters_advance_where_training_is_forced(kind):
    """Dynamo's eval graph doesn't carry them. (Forcing does not reach what Python decides, hence no two programs.)"""
    reference, module = make(kind)
    compiled = compile_(module.eval(), training=True)
    for _ in range(2):
        new = Net().state_dict()
        reference.load_state_dict(copy.deepcopy(new))
        module.load_state_dict(copy.deepcopy(new), assign=True)
        same_steps(reference, module, compiled, [X], steps=2, train=False, tolerance=1e-5)
        assert module.block1.bn.num_batches_tracked == 2


@KINDS
def test_saved_state_of_module_and_optimizer(kind):
    """Training goes on in new modules as if it had not been interrupted."""
    reference, module = make(kind)
    compiled = compile_(module)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (reference, module)]
    in_step([(reference, reference), (module, compiled)], optimizers)
    file = io.BytesIO()
    torch.save({"model": compiled.state_dict(), "optimizer": optimizers[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved["model"]) == {f"_orig_mod.{key}" for key in reference.state_dict()}

    _, module = make(kind)
    compiled = compile_(module)
    compiled.load_state_dict(saved["model"])
    optimizers[1] = torch.optim.AdamW(module.parameters(), lr=0.01)
    optimizers[1].load_state_dict(saved["optimizer"])
    in_step([(reference, reference), (module, compiled)], optimizers)


@KINDS
@pytest.mark.parametrize("form", [pytest.param("foreach", marks=pytest.mark.slow), "fused"])
def test_optimizers_over_many_tensors(kind, form):
    reference, module = make(kind)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.02, **{form: True}) for m in (reference, module)]
    in_step([(reference, reference), (module, compile_(module))], optimizers, rounds=2)
    assert graphs_compiled() == 2


def test_one_submodule_is_compiled():
    reference, module = make("eager")
    module.block1 = compile_(module.block1, overrides={"bn": "eval"})
    module.block2.compile(backend="pt2e_modes")
    theirs, ours = ([(n.replace("_orig_mod.", ""), p) for n, p in m.named_parameters()] for m in (reference, module))
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, module)]
    for mode in (True, False, True):
        for m in (reference, module):
            m.train(mode)
        reference.block1.bn.eval()
        for seed in range(2):
            for m, optimizer in zip((reference, module), optimizers, strict=True):
                torch.manual_seed(seed)
                optimizer.zero_grad()
                m(X).square().mean().backward()
                optimizer.step()
        for (name, a), (_, b) in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, msg=name)
    assert graphs_compiled() == 4
    assert module.block1.bn.num_batches_tracked == 0
    assert module.block2.bn.num_batches_tracked == 4


def test_a_bound_submodule_is_compiled():
    reference = nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Dropout(0.1))
    module = copy.deepcopy(reference)
    module[0] = bound(module[0])
    module[0].compile(backend="pt2e_modes")
    agrees(reference, module, inputs=[X])
    assert graphs_compiled() == 2


def test_a_submodule_of_a_flat_export_is_never_called_but_keeps_its_mode():
    """As with stock torch: the exported module runs the ops itself, so there is nothing to compile."""
    reference, module = make("bound")
    module.block1.compile(backend="pt2e_modes")
    agrees(reference, module, inputs=[X], flips=2)
    stock = torch.export.export(Net(), (X,)).module()
    stock.block1.compile(backend="aot_eager")
    stock(X)
    assert graphs_compiled() == 0


@pytest.mark.every(2)
@pytest.mark.parametrize("options", [{"training": True}, {"overrides": {"*bn": "train", "": "train"}}])
@pytest.mark.parametrize("form", ["bound", "unflattened"])
def test_a_bound_module_compiled_in_place_keeps_owners_and_counters(form, options):
    """Dynamo, come upon a GraphModule's ``forward`` by itself, does not know whose it is."""
    reference = Net()
    program = torch.export.export(copy.deepcopy(reference), (X,))
    module = cm.bind(program if form == "bound" else torch.export.unflatten(program)).eval()
    for owner in ("block1.drop", "block2.drop") if "overrides" in options else ():
        reference.get_submodule(owner).eval()
    module.compile(backend="pt2e_modes", options=options)
    same_steps(reference, module, inputs=[X], steps=2, train=False, tolerance=1e-5)
    assert module.block1.bn.num_batches_tracked == 2
    assert graphs_compiled() == 1


def test_a_pattern_that_matches_nothing_is_an_error_for_a_module_compiled_in_place():
    module = bound(Net())
    module.compile(backend="pt2e_modes", options={"overrides": {"block1.bm": "eval"}})
    with pytest.raises(cm.OverrideError, match=r"'block1\.bn'"):
        module(X)
