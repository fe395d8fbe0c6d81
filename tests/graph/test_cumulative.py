"""Batch norm with ``momentum=None``: the operator against eager, and the way to it through export, bind and compile."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import compile_modes as cm
from compile_modes.graph.cumulative import CUMULATIVE_BATCH_NORM as OP
from oracle import agrees, same_state

X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two cumulative batch norms, one of them without weights, beside an ordinary one and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=None)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1e-2, momentum=None, affine=False))
        self.ordinary = nn.BatchNorm1d(4, momentum=0.3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.drop(self.ordinary(self.head(x.mean((2, 3)))))


def call(bn, x):
    """The operator on the state of a batch norm module."""
    state = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    return OP(x, bn.weight, bn.bias, *state, bn.training, bn.eps, False)


def norm(kind=nn.BatchNorm2d, features=3, **options):
    torch.manual_seed(2)
    bn = kind(features, eps=1e-3, momentum=None, **options)
    for parameter in bn.parameters():
        nn.init.normal_(parameter)
    return bn


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("start", [0, 1, 1000], ids="counter {}".format)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_the_operator_equals_eager_over_many_steps(start, affine):
    eager, ours = norm(affine=affine), norm(affine=affine)
    for bn in (eager, ours):
        bn.num_batches_tracked.fill_(start)
    for step in range(40):
        x = torch.randn(4, 3, 5, 5) * 3 + step
        for bn in (eager, ours):
            bn.train(step % 5 != 4)
        torch.testing.assert_close(call(ours, x), eager(x), rtol=0, atol=0 if step % 5 != 4 else 1e-5)
        torch.testing.assert_close(ours.running_mean, eager.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.running_var, eager.running_var, rtol=1e-6, atol=1e-6)
        assert ours.num_batches_tracked.equal(eager.num_batches_tracked)


def test_eval_writes_nothing():
    bn = norm().eval()
    tensors = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    before = [(t.clone(), t._version) for t in tensors]
    torch.testing.assert_close(call(bn, X), bn(X), rtol=0, atol=0)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert tensor.equal(value)
        assert tensor._version == version


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_first_and_second_order(training):
    results = []
    for f in (lambda bn, x: bn(x), call):
        bn, x = norm().train(training), X[:2, :, :2, :2].clone().requires_grad_()
        inputs = (x, bn.weight, bn.bias)
        first = torch.autograd.grad(f(bn, x).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)
        results.append([*first, *second])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_backward_after_a_second_forward():
    bn = norm()
    (call(bn, X) + call(bn, 2 * X)).sum().backward()
    assert bn.weight.grad is not None


def test_bfloat16_input_with_float_statistics():
    eager, ours = norm(), norm()
    for step in range(5):
        x = (X + step).bfloat16()
        torch.testing.assert_close(call(ours, x), eager(x), rtol=0, atol=0)
    assert ours.running_mean.dtype == torch.float32
    same_state(eager, ours, tolerance=1e-6)


def test_statistics_of_low_precision_are_moved_by_counts_out_of_their_range():
    eager, ours = norm(affine=False).half(), norm(affine=False).half()
    for bn in (eager, ours):
        bn.num_batches_tracked.fill_(100_000)  # infinity in float16
        bn(100 + 100 * X.half()) if bn is eager else call(bn, 100 + 100 * X.half())
    assert (ours.running_mean > 0).all()
    same_state(eager, ours, tolerance=2e-3)


def test_float64_statistics_are_moved_in_float64():
    eager, ours = norm().double(), norm().double()
    for step in range(7):
        torch.testing.assert_close(call(ours, X.double() + step), eager(X.double() + step), rtol=0, atol=0)
    same_state(eager, ours, tolerance=1e-14)


def test_an_empty_batch_counts_and_leaves_the_statistics():
    eager, ours = norm(), norm()
    for x in (X, X[:0], X):
        torch.testing.assert_close(call(ours, x), eager(x), rtol=0, atol=0)
        same_state(eager, ours, tolerance=1e-6)
    assert ours.num_batches_tracked == 3


def test_inference_mode():
    eager, ours = norm(), norm()
    with torch.inference_mode():
        for training in (True, False, True):
            torch.testing.assert_close(call(ours.train(training), X), eager.train(training)(X), rtol=0, atol=1e-6)
    same_state(eager, ours, tolerance=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_operator_keeps_the_rules_of_the_dispatcher(training):
    bn = norm().train(training)
    state = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    torch.library.opcheck(OP, (X.clone().requires_grad_(), bn.weight, bn.bias, *state, training, 1e-3, False))


def test_tracing_before_dispatch_keeps_it_whole_and_after_dispatch_does_not():
    bn = norm()
    assert targets(make_fx(lambda x: call(bn, x), pre_dispatch=True)(X)) == [OP]
    assert OP not in targets(make_fx(lambda x: call(bn, x))(X))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.every(3)
def test_export_keeps_one_node_and_decomposes_on_request(strict, training):
    net = Net()
    with cm.exportable(net):
        program = torch.export.export(net.train(training), (X,), strict=strict)
    nodes = [node for node in program.graph.nodes if node.target is OP]
    owners = [list(node.meta["nn_module_stack"].values())[-1] for node in nodes]
    assert owners == [
        ("bn", "torch.nn.modules.batchnorm.BatchNorm2d"),
        ("head.1", "torch.nn.modules.batchnorm.BatchNorm1d"),
    ]
    again = torch.export.export(program.module(), (X,), strict=strict)
    assert targets(again).count(OP) == 2
    eager = copy.deepcopy(net)
    for table in ({}, None):
        decomposed = program.run_decompositions(table)
        assert OP not in targets(decomposed)
        with torch.no_grad():  # a decomposed train batch norm can't be differentiated
            torch.manual_seed(0)
            ours = decomposed.module()(X)
            torch.manual_seed(0)
            torch.testing.assert_close(ours, eager(X), rtol=1e-5, atol=1e-5)
    for name, buffer in program.state_dict.items():
        torch.testing.assert_close(buffer, eager.state_dict()[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exported_and_bound_it_switches(strict, training):
    reference = Net()
    reference.bn.num_batches_tracked.fill_(7)
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        program = torch.export.export(net.train(training), (X,), strict=strict)
    bound = cm.bind(program)
    assert "compile_modes.cumulative_batch_norm.default" in cm.explain(bound)
    agrees(reference, bound, inputs=(X,))


def test_bound_module_survives_deepcopy_a_retrace_and_a_file():
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        bound = cm.bind(torch.export.export(net.train(), (X,)))
    agrees(copy.deepcopy(reference), copy.deepcopy(bound), inputs=(X,), flips=1)
    agrees(copy.deepcopy(reference), cm.bind(torch.export.export(copy.deepcopy(bound), (X,))), inputs=(X,), flips=1)
    file = io.BytesIO()
    torch.export.save(torch.export.export(bound, (X,)), file)
    file.seek(0)
    agrees(reference, cm.bind(torch.export.load(file)), inputs=(X,), flips=1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bound_and_compiled_whole(no_inductor, training):
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        bound = cm.bind(torch.export.export(net.train(training), (X,)))
    compiled = torch.compile(bound, backend="pt2e_modes", fullgraph=True)
    agrees(reference, bound, compiled, inputs=(X,))


def test_the_mode_asked_for_by_options_counts_once(no_inductor):
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        bound = cm.bind(torch.export.export(net.eval(), (X,)))
    forced = torch.compile(bound.eval(), backend="pt2e_modes", fullgraph=True, options={"training": True})
    for _ in range(3):
        torch.manual_seed(0)
        ours = forced(X)
        torch.manual_seed(0)
        torch.testing.assert_close(ours, reference.train()(X))
        same_state(reference, bound)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bound_and_compiled_by_inductor(training):
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        bound = cm.bind(torch.export.export(net.train(training), (X,)))
    agrees(reference, bound, torch.compile(bound, backend="pt2e_modes", fullgraph=True), inputs=(X,), flips=2)


def test_eager_modules_compile_whole_within_exportable(no_inductor):
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net):
        agrees(reference, net, torch.compile(net, backend="pt2e_modes", fullgraph=True), inputs=(X,), flips=1)


def test_within_exportable_eager_calls_equal_eager():
    reference = Net()
    net = copy.deepcopy(reference)
    with cm.exportable(net) as given:
        assert given is net
        agrees(reference, net, inputs=(X,), flips=1)


class Own(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Inherited(nn.BatchNorm2d):
    pass


LAZY = nn.LazyBatchNorm2d(momentum=None)
LAZY(X)


@pytest.mark.parametrize(
    ("bn", "shape"),
    [
        (nn.BatchNorm1d(3, momentum=None), (4, 3)),
        (nn.BatchNorm1d(3, momentum=None), (4, 3, 5)),
        (nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
        (nn.BatchNorm3d(3, momentum=None), (4, 3, 2, 2, 2)),
        (nn.SyncBatchNorm(3, momentum=None), (4, 3, 2)),
        (Inherited(3, momentum=None), (4, 3, 2, 2)),
        (LAZY, (4, 3, 2, 2)),
    ],
    ids=["1d", "1d-with-length", "2d", "3d", "sync", "subclass", "materialised"],
)
def test_batch_norms_of_every_kind(bn, shape):
    x = torch.randn(shape)
    reference = copy.deepcopy(bn)
    with cm.exportable(bn):
        bound = cm.bind(torch.export.export(bn.train(), (x,)))
    agrees(reference, bound, inputs=(x,), flips=2)


@pytest.mark.parametrize(
    "bn",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None, track_running_stats=False),
        nn.LazyBatchNorm2d(momentum=None),
        Own(3, momentum=None),
        nn.InstanceNorm2d(3, momentum=None, track_running_stats=True),
    ],
    ids=["momentum", "no-statistics", "lazy", "own-forward", "instance"],
)
def test_other_modules_are_left_alone(bn):
    with cm.exportable(nn.Sequential(bn)):
        assert "forward" not in vars(bn)


def test_everything_is_put_back_also_after_an_exception():
    net = Net()

    def fail():
        with cm.exportable(net):
            with cm.exportable(net):  # finds nothing to do, and must not undo the outer one
                pass
            assert "forward" in vars(net.bn)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert all("forward" not in vars(module) for module in net.modules())
    assert type(net.bn) is nn.BatchNorm2d


def test_inputs_are_checked_as_by_eager():
    bn = norm()
    with cm.exportable(bn):
        with pytest.raises(ValueError, match="expected 4D input"):
            bn(X[0])
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn(X[:1, :, :1, :1])
        bn.eval()(X[:1, :, :1, :1])
    sync = nn.SyncBatchNorm(0, momentum=None)
    with cm.exportable(sync), pytest.raises(ValueError, match="should be non-zero"):
        sync(X[:, :0])


def test_without_exportable_an_eval_export_names_the_remedy():
    with pytest.warns(cm.ModeWarning, match=r"export under exportable\(model\)"):
        cm.bind(torch.export.export(norm().eval(), (X,)))


def test_a_synchronising_batch_norm_runs_its_own_forward(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    bn = nn.SyncBatchNorm(3, momentum=None)
    with cm.exportable(bn), pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        bn(X)
