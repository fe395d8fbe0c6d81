"""A baked program of each mode, run by onnxruntime and by ExecuTorch, against eager PyTorch.

Where masks are random, each output is compared with what it is with and without its mask.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._decomp import get_decompositions

import compile_modes as cm

aten = torch.ops.aten
X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
P = 0.25
# Modes by what is in train.
MODES = {"eval": (), "train": ("", "norm", "drop"), "Monte Carlo dropout": ("drop",), "batch statistics": ("norm",)}


class Net(nn.Module):
    """Dropout comes next to last, so that outputs tell which values are masked."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-2, momentum=0.2)
        self.head, self.drop = nn.Linear(8, 4), nn.Dropout(P)

    def forward(self, x):
        return -self.drop(self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3))))


def var_mean(x, dim=None, *, correction=None, keepdim=False):
    return torch.var(x, dim, correction=correction, keepdim=keepdim), torch.mean(x, dim, keepdim)


def dropout(x, p, train):
    mask = torch.rand(x.shape, dtype=x.dtype, device=x.device) >= p
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


def written_out(program):
    """Batch norm and dropout in train as arithmetic, which runtimes have right."""
    table = torch.export.default_decompositions()
    table.update(get_decompositions([aten._native_batch_norm_legit_functional]))
    table[aten.var_mean.correction] = var_mean
    table[aten.native_dropout.default] = dropout
    return program.run_decompositions(table)


def exported(mode):
    """A model with statistics of its own, and the program of a mode."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(3 * X + 1)
    bound = cm.bind(torch.export.export(net, (X,)))
    for model in (net, bound):
        model.eval()
        for name in MODES[mode]:
            model.get_submodule(name).training = True
    return net, torch.export.export(cm.bake(bound), (X,))


def in_onnx(program, **options):
    onnx = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    session = onnx.InferenceSession(model.SerializeToString(), **options)
    return lambda x: torch.from_numpy(np.array(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))


def in_executorch(program):
    exir, runtime = pytest.importorskip("executorch.exir"), pytest.importorskip("executorch.runtime")
    file = exir.to_edge(program).to_executorch().buffer
    loaded = runtime.Runtime.get().load_program(file)
    method = loaded.load_method("forward")

    def call(x, held=(file, loaded)):  # the method reads their memory
        return method.execute([x])[0].clone()

    return call


RUNTIMES = {
    "onnxruntime": in_onnx,
    "executorch": in_executorch,
}


def check(net, mode, call):
    """Compares two calls with eager PyTorch; eager's state is that of before the first."""
    net.drop.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        expected = net(X)
    net.load_state_dict(state)
    found = [call(X) for _ in range(2)]
    if "drop" not in MODES[mode]:
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
        return
    for one in found:
        kept = one != 0
        torch.testing.assert_close(one[kept], expected[kept] / (1 - P), rtol=1e-4, atol=1e-5)
        assert abs(kept.float().mean() - (1 - P)) < 0.1  # of 256 values: 4 standard deviations
    assert not torch.equal(*found)


@pytest.mark.parametrize("mode", MODES)
def test_a_program_that_is_written_out_has_core_ops_only_and_equals_eager(mode):
    net, program = exported(mode)
    plain = written_out(program)
    for node in plain.graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_functional.default):
        raise AssertionError(node)
    ops = {node.target for node in plain.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert all(torch.Tag.core in op.tags for op in ops), ops
    assert bool(plain.graph_signature.buffers_to_mutate) == ("norm" in MODES[mode])
    check(net, mode, plain.module())


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_eager_in_another_runtime(mode, runtime):
    net, program = exported(mode)
    check(net, mode, RUNTIMES[runtime](written_out(program)))


@pytest.mark.slow
def test_what_onnx_makes_of_a_training_batch_norm_that_is_not_written_out():
    """The exporter drops the flag; when it doesn't any more, docs/runtimes.md has to be changed."""
    net, program = exported("batch statistics")
    call = in_onnx(program)
    with torch.no_grad():
        torch.testing.assert_close(call(X), net.eval()(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(exported("batch statistics")[0], "batch statistics", call)


@pytest.mark.slow
def test_what_onnxruntime_makes_of_a_live_dropout_by_default():
    """It takes it away; when it doesn't any more, docs/runtimes.md has to be changed."""
    net, program = exported("Monte Carlo dropout")
    with torch.no_grad():
        torch.testing.assert_close(in_onnx(program)(X), net.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_executorch_makes_of_a_dropout_that_is_not_written_out():
    """It doesn't scale what it keeps; when it does, docs/runtimes.md has to be changed."""
    net, program = exported("Monte Carlo dropout")
    with torch.no_grad():
        expected = net.eval()(X)
    found = in_executorch(program)(X)
    torch.testing.assert_close(found[found != 0], expected[found != 0], rtol=1e-4, atol=1e-5)
