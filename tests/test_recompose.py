import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes._compat.frames import graphs_compiled
from compile_modes.exported.recompose import recompose
from compile_modes.graph.view import View

from nets import IMAGE, Activations, Attention, ConvNet, Norms, Recurrent, Small, UnusedNorm, UserCounter  # isort: skip
from oracle import agrees, literals, same_outputs, same_state, text  # isort: skip

aten = torch.ops.aten
VECTORS = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
STARTS = pytest.mark.parametrize("start", [True, False], ids=["train-export", "eval-export"])
VARIANTS = pytest.mark.parametrize(
    ("form", "table"),
    [
        (lambda program: program, None),
        (lambda program: program, {}),
        (lambda program: program.module(), None),
        (torch.export.unflatten, None),
    ],
    ids=["program", "empty-table", "module", "unflattened"],
)
ERASED = "erased from an eval graph"


class BatchNorms(nn.Module):
    """Affine and not, tracking and not, called once, twice, and with the momentum that looks like no update."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.plain = nn.BatchNorm1d(4, eps=1e-2, momentum=0.3, affine=False)
        self.batch_only = nn.BatchNorm1d(4, track_running_stats=False)
        self.deep = nn.Sequential(nn.BatchNorm1d(4, momentum=0.05), nn.Identity())

    def forward(self, x):
        return self.deep(self.batch_only(self.plain(self.conv(x))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4, momentum=0.3)

    def forward(self, x):
        return self.bn(self.bn(x) * 2)


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


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.2, 1e-3)


def decomposed(model, start, *args, table=None):
    program = torch.export.export(copy.deepcopy(model).train(start), args)
    return program.run_decompositions() if table is None else program.run_decompositions(table)


def bind(exported, **options):
    """Binds, with the remark on dropouts that eval exports may have lost taken for granted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"(?s).*{ERASED}", category=cm.ModeWarning)
        return cm.bind(exported, **options)


def targets(module):
    return [node.target for node in module.graph.nodes]


@STARTS
@VARIANTS
@pytest.mark.parametrize(
    ("build", "x"),
    [(BatchNorms, torch.randn(3, 4, 5)), (UserCounter, VECTORS), (Twice, VECTORS)],
    ids=["norms", "counter", "twice"],
)
def test_bound_decomposed_modules_equal_eager(build, x, form, table, start):
    if build is Twice and form is torch.export.unflatten and start:
        pytest.skip("refused, see below")
    reference = build()
    bound = bind(form(decomposed(reference, start, x, table=table)))
    assert bound.training is start
    agrees(reference, bound, inputs=[x])


@VARIANTS
@pytest.mark.parametrize(
    ("build", "x"),
    [
        (ConvNet, IMAGE),
        (Activations, torch.randn(3, 4, 6)),
        (InPlace, torch.randn(3, 4, 6)),
        (UnusedNorm, VECTORS),
        (Attention, torch.randn(2, 5, 8)),
    ],
    ids=["conv", "activations", "in-place", "unused", "attention"],
)
def test_train_exports_with_dropouts_equal_eager(build, x, form, table):
    reference = build()
    agrees(reference, cm.bind(form(decomposed(reference, True, x, table=table))), inputs=[x])


@STARTS
@pytest.mark.parametrize(
    ("build", "x"), [(BatchNorms, torch.randn(3, 4, 5)), (ConvNet, IMAGE), (Twice, VECTORS), (UserCounter, VECTORS)]
)
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
    for build in (Functional, UnusedNorm):
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
    reference = Functional()
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


class Reads(nn.Module):
    """Something else has to do with a batch norm's buffers, at a place that a subclass chooses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4, momentum=0.3)
        self.register_buffer("seen", torch.zeros(4))


class Before(Reads):
    def forward(self, x):
        shift = self.bn.running_mean.view(4)  # an alias: eager sees the update
        return self.bn(self.fc(x)) + shift


class After(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)) + self.bn.running_mean * 2


class Returned(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)), self.bn.running_var.clone()


class Averaged(Reads):
    def forward(self, x):
        y = self.bn(self.fc(x))
        self.seen.lerp_(self.bn.running_mean, 0.25)
        return y


class Counted(Reads):
    def forward(self, x):
        return self.bn(self.fc(x)) * self.bn.num_batches_tracked


class Changed(Reads):
    def forward(self, x):
        self.bn.running_mean.mul_(0.5)
        return self.bn(self.fc(x))


@STARTS
@pytest.mark.parametrize("build", [Before, After, Returned, Averaged, Counted, Changed])
def test_other_uses_of_the_buffers_are_right_or_refused(build, start):
    reference = build()
    program = decomposed(reference, start, VECTORS)
    plain = copy.deepcopy(program.module())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bound = cm.bind(program)
    refused = any("decomposed, and its" in str(w.message) for w in caught)
    assert refused is (start or build is Changed)
    same_outputs(plain, bound, VECTORS)
    same_state(plain, bound, 0.0)
    reference.load_state_dict(bound.state_dict())
    if not refused:
        agrees(reference, bound, inputs=[VECTORS], flips=2)
        return
    assert "decomposed, and its" in cm.explain(bound)
    reference.train(start)
    outputs = [m(VECTORS) for m in (reference, bound)]
    for m, y in zip((reference, bound), outputs, strict=True):
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()  # the graph is functional, so it works
        torch.testing.assert_close(m.fc.weight.grad, reference.fc.weight.grad)
    same_state(reference, bound)


def test_a_refused_batch_norm_keeps_its_reason_and_is_bound_twice():
    with pytest.warns(cm.ModeWarning, match=r"its running_mean is also used by mul"):
        bound = cm.bind(decomposed(After(), True, VECTORS))
    graphs = text(bound)
    with pytest.warns(cm.ModeWarning, match=r"its running_mean is also used by mul"):
        cm.bind(bound)
    assert text(bound) == graphs


def test_saved_statistics_that_are_read():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            bn = self.bn
            stats = (bn.running_mean, bn.running_var)
            y, mean, _, *new = aten._native_batch_norm_legit_functional(x, bn.weight, bn.bias, *stats, True, 0.1, 1e-5)
            for buffer, value in zip(stats, new, strict=True):
                buffer.copy_(value)
            return y, mean

    with pytest.warns(cm.ModeWarning, match="is read, which training IR does not return"):
        bound = cm.bind(decomposed(Saved(), True, VECTORS))
    y, mean = bound(VECTORS)
    torch.testing.assert_close(mean, VECTORS.mean(0))
    y.sum().backward()


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


def test_instance_norm_is_refused_by_name_and_trains():
    x = torch.randn(3, 4, 5)
    for start in (True, False):
        reference = Norms()
        with pytest.warns(cm.ModeWarning) as caught:
            bound = cm.bind(decomposed(reference, start, x))
        said = [str(w.message) for w in caught if w.category is cm.ModeWarning]
        assert "owner 'instance'): CM720: decomposed, and its running statistics are no buffers" in said[0]
        assert [s.owner for s in cm.sites(bound) if s.bound] == ["tracking"]
        reference.train(start)
        torch.testing.assert_close(bound(x), reference(x))
        bound(x).sum().backward()


def test_shared_modules_of_an_unflattened_module_are_refused_by_name_and_train():
    reference = Twice()
    module = torch.export.unflatten(decomposed(reference, True, VECTORS))
    with pytest.warns(cm.ModeWarning, match="2 sites keep their exported mode"):
        cm.bind(module)
    for _ in range(3):
        results = [m(VECTORS) for m in (reference, module)]
        torch.testing.assert_close(results[1], results[0])
        for y in results:
            y.square().sum().backward()
        torch.testing.assert_close(module.bn.weight.grad, reference.bn.weight.grad)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_batch_norm_inside_a_branch_is_refused_by_name():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.bn(y), lambda y: y * 2, (x,))

    with pytest.warns(cm.ModeWarning, match=r"decomposed"):
        bound = cm.bind(decomposed(Branch(), False, VECTORS))
    assert [site.bound for site in cm.sites(bound)] == [False]


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


@pytest.mark.parametrize("lost", [3, 4, "counter", "copy"])
def test_an_update_that_does_not_reach_its_buffer_is_refused(lost):
    module = decomposed(Small(4), True, VECTORS).module()
    copies = [node for node in module.graph.nodes if node.target is aten.copy_.default]
    for node in copies:
        value = node.args[1]
        index = value.args[1] if value.target is operator.getitem else "counter"
        if index == lost or (lost == "copy" and index == 3):
            module.graph.erase_node(node)
            if lost in (3, 4):
                module.graph.erase_node(value)
    module.recompile()
    plain = copy.deepcopy(module)
    with pytest.warns(cm.ModeWarning, match="is not updated by the graph"):
        cm.bind(module)
    same_outputs(plain, module, VECTORS)
    same_state(plain, module, 0.0)


def test_dropouts_erased_from_eval_graphs_are_named():
    with pytest.warns(cm.ModeWarning, match=rf"{ERASED}; .*left nothing behind: block1.drop, block2.drop, drop\)"):
        bound = cm.bind(decomposed(ConvNet(), False, IMAGE))
    assert "left nothing behind: block1.drop" in cm.explain(bound)
    reference = ConvNet().eval()
    reference.load_state_dict(bound.state_dict())
    torch.testing.assert_close(bound(IMAGE), reference(IMAGE))
    with pytest.warns(cm.ModeWarning, match=ERASED):
        cm.bind(decomposed(ConvNet(), False, IMAGE).module())


def test_nothing_is_said_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error", cm.ModeWarning)
        cm.bind(decomposed(ConvNet(), True, IMAGE))
        bound = cm.bind(decomposed(nn.Linear(4, 4), False, VECTORS))
    assert cm.explain(bound) == "no mode-dependent sites"


def test_a_batch_norm_whose_result_is_unused_is_gone_from_an_eval_graph():
    with pytest.warns(cm.ModeWarning, match="bn: its batch norm is not in the graph"):
        bound = cm.bind(decomposed(UnusedNorm(), False, VECTORS))
    assert "bn: its batch norm is not in the graph" in cm.explain(bound)


@STARTS
def test_rrelu_both_ways(start):
    x = torch.randn(3, 4)
    reference = nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.RReLU(0.2, 0.4))
    agrees(reference, bind(decomposed(reference, start, x)), inputs=[x])


def test_lost_rnn_dropout_is_named():
    with pytest.warns(cm.ModeWarning) as caught:
        cm.bind(decomposed(Recurrent(), True, torch.randn(3, 7, 4)))
    (said,) = (str(w.message) for w in caught if w.category is cm.ModeWarning)
    assert "lstm: torch's decomposition of an RNN drops the dropout" in said
    assert "gru: torch's decomposition" in said


def test_draws_outside_of_dropout_modules_are_named():
    class Draws(nn.Module):
        def forward(self, x):
            return F.dropout(F.dropout2d(x, 0.4, self.training), 0.2, self.training)

    with pytest.warns(cm.ModeWarning, match="random numbers of '' are drawn in both modes"):
        bound = cm.bind(decomposed(Draws(), True, IMAGE))
    assert [site.op.family for site in cm.sites(bound)] == ["dropout"]


class Mine(nn.Dropout2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_dropout_module_of_the_users_own_is_named():
    stays = pytest.warns(cm.ModeWarning, match="0: its dropout is decomposed, and stays")
    with pytest.warns(cm.ModeWarning, match="random numbers of '0' are drawn in both modes"), stays:
        cm.bind(decomposed(nn.Sequential(Mine(0.3), nn.BatchNorm2d(3)), True, IMAGE))


@pytest.mark.usefixtures("no_inductor")
@STARTS
def test_compiled(start):
    x = torch.randn(3, 4, 5)
    reference = BatchNorms()
    bound = bind(decomposed(reference, start, x))
    agrees(reference, bound, torch.compile(bound, backend="pt2e_modes"), [x])
    assert graphs_compiled() == 2


@pytest.mark.usefixtures("no_inductor")
def test_the_backend_names_bind_for_an_unbound_one():
    module = decomposed(BatchNorms(), False, torch.randn(3, 4, 5)).module()
    with pytest.warns(cm.ModeWarning, match="with 2 mode-dependent sites is compiled as it was exported"):
        torch.compile(module, backend="pt2e_modes")(torch.randn(3, 4, 5))


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


def test_set_mode_refuses_what_bind_has_not_put_together():
    module = decomposed(BatchNorms(), True, torch.randn(3, 4, 5)).module()
    report = cm.set_mode(module, False)
    assert [site.owner for site, _ in report.refused] == ["plain", "deep.0"]
    assert all("bind()" in why for _, why in report.refused)


def test_the_drop_ins_take_decomposed_modules():
    model = BatchNorms()
    x = torch.randn(3, 4, 5)
    module = cm.move_exported_model_to_eval(decomposed(model, True, x).module())
    torch.testing.assert_close(module(x), model.eval()(x))


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
