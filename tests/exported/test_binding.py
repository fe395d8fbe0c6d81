"""``bind``: modules that follow their flags, beside eager ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx, nn

import compile_modes as cm
from nets import (
    IMAGE,
    VECTORS,
    ConvNet,
    FunctionalNorm,
    HardCoded,
    Regions,
    Small,
    Twice,
)  # fmt: skip
from oracle import agrees, literals, same_outputs, same_state, text
from setups import STARTS, export, nets, twin


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
@STARTS
@pytest.mark.parametrize(
    ("build", "x"), nets("conv", "activations", "norms", "recurrent", "regions", "unused", "counter")
)
@pytest.mark.every(3)
def test_bound_modules_equal_eager(build, x, start):
    reference, bound = twin(build(), start, x)
    agrees(reference, bound, inputs=[x], tolerance=0.0)


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
@STARTS
@pytest.mark.parametrize(
    ("build", "x"), nets("conv", "activations", "norms", "recurrent", "regions", "unused", "counter")
)
@pytest.mark.every(3)
def test_binding_changes_no_behaviour(build, x, start):
    ep = export(build().train(start), x)
    plain, bound = ep.module(), copy.deepcopy(cm.bind(ep.module()))
    plain = copy.deepcopy(plain)
    same_outputs(plain, bound, x)
    same_state(plain, bound, 0.0)
    assert bound.training is start


@STARTS
def test_binding_twice_changes_nothing(start):
    bound = cm.bind(export(ConvNet().train(start), IMAGE))
    bound.block1.train(not start)
    graphs, flags = text(bound), {name: m.training for name, m in bound.named_modules()}
    assert cm.bind(bound) is bound
    assert text(bound) == graphs
    assert {name: m.training for name, m in bound.named_modules()} == flags


def test_train_and_eval_are_those_of_nn_module():
    bound = cm.bind(export(ConvNet(), IMAGE))
    assert bound.eval() is bound
    assert not any(m.training for m in bound.modules())
    assert bound.train() is bound
    assert all(m.training for m in bound.modules())
    assert bound.requires_grad_(False) is bound


@STARTS
def test_a_frozen_batch_norm_stays_frozen_until_train(start):
    reference, bound = twin(ConvNet(), start, IMAGE)
    agrees(reference, bound, inputs=[IMAGE], touch=lambda m: m.block1.bn.eval(), tolerance=0.0)
    assert bound.block1.bn.num_batches_tracked == 0
    assert bound.block2.bn.num_batches_tracked > 0
    agrees(reference, bound, inputs=[IMAGE], flips=1, tolerance=0.0)
    assert bound.block1.bn.num_batches_tracked > 0


@pytest.mark.parametrize("touch", [lambda m: m.drop.eval(), lambda m: m.block2.drop.train(), lambda m: m.block2.eval()])
def test_owners_without_state_are_submodules_again(touch):
    reference, bound = twin(ConvNet(), False, IMAGE)
    agrees(reference, bound, inputs=[IMAGE], touch=touch, flips=1, tolerance=0.0)


def test_state_dicts_load_both_ways():
    model = ConvNet()
    bound = cm.bind(export(ConvNet(), IMAGE))
    assert bound.state_dict().keys() == model.state_dict().keys()
    bound.load_state_dict(model.state_dict(), strict=True)
    same_state(model, bound, 0.0)
    other = ConvNet()
    other.load_state_dict(bound.state_dict(), strict=True)
    same_state(bound, other, 0.0)


@STARTS
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.every(6)
def test_export_of_a_bound_module_has_the_literals_of_its_mode(start, mode, strict):
    bound = cm.bind(export(ConvNet().train(start), IMAGE)).train(mode)
    again = torch.export.export(bound, (IMAGE,), strict=strict)
    assert [s.training for s in cm.sites(again)] == [mode] * 7
    assert literals(again) == literals(export(ConvNet().train(mode), IMAGE).module())
    reference = ConvNet()
    rebound = cm.bind(again)
    rebound.load_state_dict(reference.state_dict())
    agrees(reference, rebound, inputs=[IMAGE], flips=1, tolerance=0.0)


@pytest.mark.parametrize(("build", "x"), [(ConvNet, IMAGE), (Regions, IMAGE)])
def test_a_copy_flips_on_its_own(build, x):
    reference, bound = twin(build(), True, x)
    copied = copy.deepcopy(bound)
    copied.eval()
    assert all(m.training for m in bound.modules())
    bound.eval()
    copied.train()
    assert not any(m.training for m in bound.modules())
    agrees(copy.deepcopy(reference), copied, inputs=[x], tolerance=0.0)
    agrees(reference, bound, inputs=[x], tolerance=0.0)


def test_a_strict_eval_export_has_its_counters_back():
    reference = ConvNet()
    program = torch.export.export(copy.deepcopy(reference).eval(), (IMAGE,), strict=True)
    agrees(reference, cm.bind(program), inputs=[IMAGE], tolerance=0.0)
    with pytest.warns(cm.ModeWarning, match="num_batches_tracked of 'block1.bn', 'block2.bn' is not in"):
        cm.bind(program.module())


def test_keep_leaves_owners_baked():
    bound = cm.bind(export(ConvNet(), IMAGE), keep=["block1.*"]).eval()
    assert {s.owner for s in cm.sites(bound) if s.training} == {"block1.bn", "block1.drop"}
    assert {s.owner for s in cm.sites(bound) if not s.bound} == {"block1.bn", "block1.drop"}
    with pytest.raises(cm.OverrideError, match=r"head\.\*"):
        cm.bind(export(ConvNet(), IMAGE), keep=["head.*"])
    for keep in ([3], None):
        with pytest.raises(cm.OptionError, match="owner glob"):
            cm.bind(export(ConvNet(), IMAGE), keep=keep)


@STARTS
@pytest.mark.parametrize("compiled", [False, True])
def test_functional_batch_norm_counts_nothing(start, compiled):
    reference, bound = twin(FunctionalNorm(), start, VECTORS)
    assert [site.owner for site in cm.sites(bound)] == [""]
    call = torch.compile(bound, backend="eager") if compiled else bound
    agrees(reference, bound, call, [VECTORS], flips=2, tolerance=0.0)
    assert bound.bn.num_batches_tracked == 0


def test_kept_owners_stay_kept_until_baked():
    bound = cm.bind(export(ConvNet(), IMAGE), keep=["drop"])
    cm.move_exported_model_to_eval(cm.bind(bound))
    assert {s.owner for s in cm.sites(bound) if s.training} == {"drop"}
    cm.bind(cm.bake(bound)).eval()
    assert not any(s.training for s in cm.sites(bound) if s.owner != "drop")


def test_the_root_trains_if_anything_does():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4).eval(), nn.Dropout(0.3))
    bound = cm.bind(export(model, VECTORS))
    assert bound.training
    assert {s.owner: s.training for s in cm.sites(bound)} == {"1": False, "2": False, "3": True}


@pytest.mark.parametrize("edit", [lambda ep: cm.set_mode(ep, False), cm.bake])
def test_programs_are_not_edited_in_place(edit):
    with pytest.raises(cm.BindError, match="can't be edited in place"):
        edit(export(ConvNet(), IMAGE))


@STARTS
def test_a_batch_norm_under_several_names_has_one_mode(start):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.BatchNorm1d(4, momentum=0.3)
            self.b = self.a
            self.layers = nn.ModuleList([self.a, nn.Linear(4, 4)])

        def forward(self, x):
            return self.layers[1](self.layers[0](self.b(self.a(x)) * 2))

    reference, bound = twin(Aliased(), start, VECTORS)
    assert bound.a is bound.b is bound.layers.get_submodule("0")
    for touch in (lambda m: m, lambda m: m.b.eval(), lambda m: m.a.eval()):
        agrees(reference, bound, inputs=[VECTORS], flips=2, touch=touch, tolerance=0.0)


@STARTS
def test_hard_coded_flags_stay(start):
    reference, bound = twin(HardCoded(), start, VECTORS)
    if start:  # all three look alike in a train export; an eval export tells
        assert all(s.bound for s in cm.sites(bound))
        return
    assert [s.hard_coded for s in cm.sites(bound)] == [False, False, True]
    agrees(reference, bound, inputs=[VECTORS], tolerance=0.0)
    again = cm.bind(torch.export.export(bound.train(), (VECTORS,)))
    assert [s.bound for s in cm.sites(again)] == [True, True, False], "the knowledge survives an export in train"
    rebound = cm.bind(cm.bake(again, training=True))
    assert [s.bound for s in cm.sites(rebound)] == [True, True, False], "and being baked"


def test_a_cumulative_average_is_refused_aloud():
    with pytest.warns(cm.ModeWarning, match="cumulative average"):
        bound = cm.bind(export(nn.BatchNorm1d(4, momentum=None).eval(), VECTORS))
    assert not cm.sites(bound)[0].bound


@STARTS
@pytest.mark.parametrize(("build", "x"), nets("conv", "activations", "norms", "recurrent", "regions"))
@pytest.mark.every(3)
def test_unflattened_modules(build, x, start):
    reference = build()
    module = torch.export.unflatten(export(copy.deepcopy(reference).train(start), x))
    if module.state_dict().keys() != reference.state_dict().keys():
        pytest.skip("unflatten itself changes the state_dict of this model")
    assert cm.bind(module) is module
    agrees(reference, module, inputs=[x], tolerance=0.0)


def test_shared_modules_of_an_unflattened_module():
    for start in (True, False):
        reference = Twice()
        module = cm.bind(torch.export.unflatten(export(copy.deepcopy(reference).train(start), VECTORS)))
        for mode in (True, False, True):
            reference.train(mode)
            module.train(mode)
            assert torch.equal(module(VECTORS), reference(VECTORS))
        reference.bn.eval()
        module.bn.eval()
        assert torch.equal(module(VECTORS), reference(VECTORS))
        assert module.bn.num_batches_tracked == reference.bn.num_batches_tracked == 4


def test_dynamic_batches():
    batch = torch.export.Dim("batch", min=2, max=64)
    reference = ConvNet()
    bound = cm.bind(torch.export.export(copy.deepcopy(reference), (IMAGE,), dynamic_shapes={"x": {0: batch}}))
    for size in (3, 6):
        agrees(reference, bound, inputs=[IMAGE[:size]], flips=1, tolerance=0.0)


def test_dead_code_elimination_keeps_statistics_moving():
    reference, bound = twin(ConvNet(), True, IMAGE)
    bound.graph.eliminate_dead_code()
    bound.recompile()
    agrees(reference, bound, inputs=[IMAGE], flips=1, tolerance=0.0)


def test_eval_does_not_touch_the_counter():
    _, bound = twin(ConvNet(), True, IMAGE)
    bound.eval()
    version = bound.block1.bn.num_batches_tracked._version
    bound(IMAGE)
    assert bound.block1.bn.num_batches_tracked._version == version


def test_a_taken_name_is_an_error_and_leaves_the_module_alone():
    gm = export(ConvNet(), IMAGE).module()
    gm.drop = 3
    code, train = gm.code, gm.__dict__["train"]
    with pytest.raises(cm.BindError, match="taken by a int"):
        cm.bind(gm)
    assert gm.code == code
    assert gm.__dict__["train"] is train


def test_bind_takes_what_a_symbolic_trace_cannot_give():
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert cm.bind(traced) is traced
    with pytest.raises(cm.BindError, match="int has no graph"):
        cm.bind(3)


def test_the_code_of_a_bound_graph():
    for start in (True, False):
        reference, bound = twin(Small(4), start, VECTORS)
        assert_expected_inline(
            text(bound),
            """\
v0 = advance(bn.num_batches_tracked, bn.training)
v1 = aten.batch_norm.default(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, 0.03, 0.001, False)
v2 = aten.dropout.default(v1, 0.25, drop.training)
return (v2)""",
        )
        agrees(reference, bound, inputs=[VECTORS], tolerance=0.0)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.export tells the result from the input there")
def test_explain_names_eval_dropouts_whose_input_may_be_used_again():
    class Reuse(nn.Module):
        def forward(self, x):
            y = x + 1
            return F.dropout(y, 0.2, self.training) * 2 + y

    says = "exported in eval: users of the input of dropout"
    program = export(Reuse().eval(), VECTORS)
    assert says in cm.explain(program)
    with pytest.warns(cm.ModeWarning, match="1 dropouts exported in eval mode have several users: dropout"):
        assert says in cm.explain(cm.bind(program))
    assert says not in cm.explain(cm.bind(export(Reuse(), VECTORS)))
    agrees_in_outputs = cm.bind(export(Reuse(), VECTORS))
    for mode in (True, False):
        same_outputs(Reuse().train(mode), agrees_in_outputs.train(mode), VECTORS)
