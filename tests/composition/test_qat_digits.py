"""Quantization-aware training to the end, on scikit-learn's digits: ours, with flips, beside eager QAT without any."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from oracle import same_state
from setups import compile_

pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
datasets = pytest.importorskip("sklearn.datasets")

EPOCHS, BATCH = 4, 64
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.__version__ < "2.12", reason="the quantizer annotates nothing on torch 2.11"),
]


class Net(nn.Module):
    """With torchao's own eps and momentum, so that there is nothing to restore."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16 * 4, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.head(self.drop(x.flatten(1)))


@pytest.fixture(scope="module")
def digits():
    """Training and test images in [0, 1], of shape (n, 1, 8, 8), and their digits."""
    images, targets = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8), torch.tensor(targets)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: 22 * BATCH], order[22 * BATCH : 28 * BATCH]  # whole batches
    return (x[train], y[train]), (x[test], y[test])


def prepared(model):
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    module = torch.export.export(model, (torch.zeros(BATCH, 1, 8, 8),)).module()
    return quantize.prepare_qat_pt2e(module, quantizer)


def batches(x, y):
    yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


def epoch(call, optimizer, data, seed):
    torch.manual_seed(seed)
    for x, y in batches(*data):
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y).backward()
        optimizer.step()


def predictions(call, data):
    with torch.no_grad():
        return torch.cat([call(x) for x, _ in batches(*data)])


def accuracy(logits, data):
    return (logits.argmax(1) == data[1]).float().mean().item()


def test_the_quantized_model_is_as_accurate_as_that_of_eager_training(digits, no_inductor):
    """Eager QAT can't evaluate in between; ours does after each epoch, compiled, and trains on as if it hadn't."""
    train, test = digits
    torch.manual_seed(0)
    model = Net()
    standard, ours = prepared(copy.deepcopy(model)), cm.bind(prepared(model))
    assert {site.owner for site in cm.sites(ours) if site.bound} == {"norm1", "norm2", "drop"}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (standard, ours)]
    for module in (standard, ours):
        torch.manual_seed(1)
        module(train[0][:BATCH])  # observers get their state's size in an eager call
    compiled, seen = compile_(ours), []
    for number in range(EPOCHS):
        epoch(standard, optimizers[0], train, number)
        ours.train()
        epoch(compiled, optimizers[1], train, number)
        ours.eval().apply(pt2e.disable_observer)
        before = copy.deepcopy(ours.state_dict())
        seen.append(accuracy(predictions(compiled, test), test))
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        ours.apply(pt2e.enable_observer)
    assert seen[0] < seen[-1]

    ours.train()
    same_state(standard, ours, 1e-3)  # 88 steps that round to 8 bits, compiled and not
    expected, quantized = quantize.convert_pt2e(standard), quantize.convert_pt2e(cm.bake(ours))
    for module in (expected, quantized):
        cm.move_exported_model_to_eval(module)
        weights = [t for name, t in module.state_dict().items() if "frozen" in name]
        assert weights
        assert all(t.dtype is torch.int8 for t in weights)
        assert not [n for n in module.graph.nodes if "batch_norm" in str(n.target)]
    logits = [predictions(module, test) for module in (expected, quantized)]
    ours_is, eager_is = accuracy(logits[1], test), accuracy(logits[0], test)
    assert ours_is > 0.9
    assert abs(ours_is - eager_is) <= 2 / len(test[1])  # two images of 384
    assert abs(ours_is - seen[-1]) <= 4 / len(test[1])  # what fake quantization promised
