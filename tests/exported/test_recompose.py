import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes.exported.recompose import recompose
from compile_modes.graph.view import View
from exported.decomposed import BatchNorms, bind, decomposed
from graphs import graphs_compiled
from nets import (
    IMAGE,
    TOKENS,
    VECTORS,
    Activations,
    Attention,
    ConvNet,
    FunctionalNorm,
    Small,
    Twice,
    UnusedNorm,
    UserCounter,
)
from oracle import agrees, literals, same_outputs, same_state, text
from setups import STARTS

aten = torch.ops.aten
FORMS = [
    pytest.param(lambda program: program, None, id="program"),
    pytest.param(lambda program: program, {}, id="empty-table"),
    pytest.param(lambda program: program.module(), None, id="module"),
    pytest.param(torch.export.unflatten, None, id="unflattened"),
]


def each_form(**nets):
    """All nets in all forms; by default, all forms of the first net and the programs of the others."""
    return pytest.mark.parametrize(
        ("build", "x", "form", "table"),
        [
            pytest.param(*net, *form.values, id=f"{name}-{form.id}", marks=[pytest.mark.slow] if row and column else [])
            for row, (name, net) in enumerate(nets.items())
            for column, form in enumerate(FORMS)
        ],
    )


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.layers = nn.Sequential(
            nn.Dropout(0.7, inplace=True),
            nn.Dropout1d(0.2, inplace=True),
            nn.AlphaDropout(0.15, inplace=True),
            nn.FeatureAlphaDropout(0.25, inplace=True),
            nn.RReLU(inplace=True),
        )

    def forward(self, x):
        return self.layers(self.fc(x) * 2)


def targets(module):
    return [node.target for node in module.graph.nodes]


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
@STARTS
@each_form(
    norms=(BatchNorms, torch.randn(3, 4, 5)),
    counter=(UserCounter, VECTORS),
    twice=(Twice, VECTORS),
)
@pytest.mark.every(10)
def test_bound_decomposed_modules_equal_eager(build, x, form, table, start):
    if build is Twice and form is torch.export.unflatten and start:
        pytest.skip("refused, see below")
    reference = build()
    bound = bind(form(decomposed(reference, start, x, table=table)))
    assert bound.training is start
    agrees(reference, bound, inputs=[x])


@each_form(
    conv=(ConvNet, IMAGE),
    activations=(Activations, torch.randn(3, 4, 6)),
    in_place=(InPlace, torch.randn(3, 4, 6)),
    unused=(UnusedNorm, VECTORS),
    attention=(Attention, TOKENS),
)
@pytest.mark.every(3)
def test_train_exports_with_dropouts_equal_eager(build, x, form, table):
    reference = build()
    agrees(reference, cm.bind(form(decomposed(reference, True, x, table=table))), inputs=[x])


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
@STARTS
@pytest.mark.parametrize(
    ("build", "x"), [(BatchNorms, torch.randn(3, 4, 5)), (ConvNet, IMAGE), (Twice, VECTORS), (UserCounter, VECTORS)]
)
@pytest.mark.every(3)
def test_binding_changes_no_behaviour(build, x, start):
    program = decomposed(build(), start, x)
    plain, bound = copy.deepcopy(program.module()), copy.deepcopy(bind(program))
    same_outputs(plain, bound, x)
    same_state(plain, bound, 0.0)


def test_backward_fails_before_binding_and_works_after_it():
    module = decomposed(BatchNorms(), True, torch.randn(3, 4, 5)).module()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(torch.randn(3, 4, 5)).sum().backward()
    cm.bind(module)(torch.randn(3, 4, 5)).sum().backward()
    assert module.conv.weight.grad is not None


def test_the_graph_is_the_one_that_was_decomposed():
    for build in (FunctionalNorm, UnusedNorm):
        program = torch.export.export(build(), (VECTORS,))
        assert text(cm.bind(program.run_decompositions({}))) == text(cm.bind(program))
    bound = bind(decomposed(Twice(), False, VECTORS))
    assert_expected_inline(
        text(bound),
        """\
v0 = advance(bn.num_batches_tracked, bn.training)
v1 = aten.batch_norm.default(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, 0.3, 1e-05, False)
v2 = aten.mul.Tensor(v1, 2)
v3 = advance(bn.num_batches_tracked, bn.training)
v4 = aten.batch_norm.default(v2, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, 0.3, 1e-05, False)
return (v4)""",
    )
    bound.graph.lint()


def test_literals_come_back():
    x = torch.randn(3, 4, 6)
    kinds = (
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
    )  # without a kernel: their nodes become a region
    assert literals(cm.bind(decomposed(Activations(), True, x, table={}))) == [
        {"op": "noise", "results": 1}
        if site["op"].split(".")[1] in kinds
        else {**site, "op": site["op"].replace("aten.dropout", "aten.native_dropout")}
        for site in literals(cm.bind(torch.export.export(Activations(), (x,))))
    ]


def test_training_ir_is_not_touched():
    module = torch.export.export(ConvNet(), (IMAGE,)).module()
    code = module.code
    assert not recompose(View(module)).decomposed
    assert module.code == code


@STARTS
def test_frozen_batch_norms(start):
    x = torch.randn(3, 4, 5)
    reference = BatchNorms()
    bound = bind(decomposed(reference, start, x))
    agrees(reference, bound, inputs=[x], touch=lambda m: m.plain.eval())
    assert bound.plain.num_batches_tracked == 0
    agrees(reference, bound, inputs=[x], touch=lambda m: m.deep.train(), flips=1)
    assert bound.plain.num_batches_tracked > 0


def test_a_program_with_parts_in_either_mode():
    reference = BatchNorms()
    reference.deep.eval()
    x = torch.randn(3, 4, 5)
    program = torch.export.export(copy.deepcopy(reference), (x,)).run_decompositions()
    bound = cm.bind(program)
    assert [bound.plain.training, bound.deep.get_submodule("0").training] == [True, False]
    agrees(reference, bound, inputs=[x], touch=lambda m: m.deep.eval())
    agrees(reference, bound, inputs=[x])


@STARTS
def test_functional_batch_norm_counts_nothing(start):
    reference = FunctionalNorm()
    bound = bind(decomposed(reference, start, VECTORS))
    agrees(reference, bound, inputs=[VECTORS])
    assert bound.bn.num_batches_tracked == 0


def test_train_and_eval_calls_on_the_same_statistics():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4, momentum=0.4)

        def forward(self, x):
            y = self.bn(x)
            return y + F.batch_norm(x, self.bn.running_mean, self.bn.running_var, None, None, False, 0.1, 1e-3)

    reference = Both()
    program = decomposed(reference, True, VECTORS)
    bound = cm.bind(program, keep=[""])
    for _ in range(3):
        torch.testing.assert_close(bound(VECTORS), reference(VECTORS))
        same_state(reference, bound)
    torch.testing.assert_close(bound.eval()(VECTORS), reference.eval()(VECTORS))


@pytest.mark.filterwarnings("ignore:CM240")  # of the counter that counts in both modes, as it is meant to
def test_buffers_of_the_users_own_are_updated_as_before():
    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4, momentum=0.3)
            self.register_buffer("ema", torch.ones(4))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            y = self.bn(x)
            self.ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.num_batches_tracked += 1
            return y * self.ema

    for start in (True, False):
        reference = Ema()
        bound = bind(decomposed(reference, start, VECTORS))
        assert targets(bound).count(aten.copy_.default) == 2, "one for each buffer of the user's own"
        agrees(reference, bound, inputs=[VECTORS])


KERNELS = {
    aten._native_batch_norm_legit_functional.default: (aten._batch_norm_with_update_functional.default, {3: 4, 4: 5}),
    aten._native_batch_norm_legit_no_training.default: (aten._batch_norm_no_update.default, {}),
}


def with_kernels_of_other_devices(module):
    """The same graph with the batch norms that decompositions for other devices leave."""
    for node in module.graph.nodes:
        if node.target in KERNELS:
            target, moved = KERNELS[node.target]
            if moved:
                node.args = (*node.args[:5], *node.args[6:])  # training is in the name
            node.target = target
            for user in list(node.users):
                user.args = (node, moved.get(user.args[1], user.args[1]))
    module.recompile()
    return module


@STARTS
def test_batch_norm_kernels_of_other_devices(start):
    x = torch.randn(3, 4, 5)
    reference = BatchNorms()
    module = with_kernels_of_other_devices(decomposed(reference, start, x).module())
    assert [s.training for s in cm.sites(module)] == [start, None, start]
    agrees(reference, bind(module), inputs=[x])


@pytest.mark.slow
def test_a_kernel_that_updates_in_place():
    reference = BatchNorms()
    x = torch.randn(3, 4, 5)
    module = decomposed(reference, True, x).module()
    for node in list(module.graph.nodes):
        if node.target is aten._native_batch_norm_legit_functional.default:
            node.target, node.args = aten._batch_norm_with_update.default, (*node.args[:5], *node.args[6:])
            for user in list(node.users):
                for copied in list(user.users) if user.args[1] else []:
                    module.graph.erase_node(copied)
                if user.args[1]:
                    module.graph.erase_node(user)
    module.recompile()
    agrees(reference, cm.bind(module), inputs=[x])


@STARTS
def test_rrelu_both_ways(start):
    x = torch.randn(3, 4)
    reference = nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.RReLU(0.2, 0.4))
    agrees(reference, bind(decomposed(reference, start, x)), inputs=[x])


@pytest.mark.every(2)
@pytest.mark.usefixtures("no_inductor")
@STARTS
def test_compiled(start):
    x = torch.randn(3, 4, 5)
    reference = BatchNorms()
    bound = bind(decomposed(reference, start, x))
    agrees(reference, bound, torch.compile(bound, backend="pt2e_modes"), [x])
    assert graphs_compiled() == 2


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", [True, False])
def test_export_of_a_bound_module(mode):
    reference = BatchNorms()
    x = torch.randn(3, 4, 5)
    bound = cm.bind(decomposed(reference, True, x)).train(mode)
    program = torch.export.export(bound, (x,))
    assert [s.training for s in cm.sites(program)] == [mode, None, mode]
    agrees(reference, cm.bind(program), inputs=[x])
    again = bind(program.run_decompositions())
    agrees(reference, again, inputs=[x], flips=1)


def test_the_drop_ins_take_decomposed_modules():
    model = BatchNorms()
    x = torch.randn(3, 4, 5)
    module = cm.move_exported_model_to_eval(decomposed(model, True, x).module())
    torch.testing.assert_close(module(x), model.eval()(x))


@pytest.mark.every(2)
@pytest.mark.parametrize("form", [lambda program: program.module(), torch.export.unflatten])
def test_a_failing_bind_leaves_the_module_alone(form):
    reference = Small(4)
    module = form(decomposed(reference, True, VECTORS))
    before = text(module)
    with pytest.raises(cm.OverrideError, match=r"head\.\*"):
        cm.bind(module, keep=["head.*"])
    assert text(module) == before
    same_outputs(reference, module, VECTORS)
    agrees(reference, cm.bind(module), inputs=[VECTORS], flips=1)
