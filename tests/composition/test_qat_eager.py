"""Composition with torchao's PT2E quantization-aware training."""

import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from oracle import same_state, text

quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(6))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def prepared(model):
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return quantize.prepare_qat_pt2e(torch.export.export(model, (X,)).module(), quantizer)


def train(module, steps=3):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_a_prepared_module_is_bound_trained_and_converted_as_the_standard_flow():
    model = Net()
    standard, bound = (prepared(copy.deepcopy(model)) for _ in range(2))
    with pytest.raises(NotImplementedError):
        bound.eval()
    assert cm.bind(bound) is bound
    assert {site.owner for site in cm.sites(bound) if site.bound} == {"bn", "drop"}
    for module in (standard, bound):
        train(module)
    same_state(standard, bound, 0.0)
    assert bound.bn.num_batches_tracked == 3

    expected, converted = quantize.convert_pt2e(standard), quantize.convert_pt2e(cm.bake(bound))
    assert text(converted) == text(expected)
    assert torch.equal(cm.move_exported_model_to_eval(converted)(X), cm.move_exported_model_to_eval(expected)(X))


@pytest.mark.slow
def test_freezing_batch_norm_in_quantization_aware_training():
    bound = cm.bind(prepared(Net()))
    train(bound, 2)
    mean = bound.bn.running_mean.clone()
    bound.bn.eval()
    train(bound, 2)
    assert torch.equal(bound.bn.running_mean, mean)
    assert bound.bn.num_batches_tracked == 2
    bound.train()
    train(bound, 1)
    assert not torch.equal(bound.bn.running_mean, mean)
    mean = bound.bn.running_mean.clone()
    bound.eval()(X)
    assert torch.equal(bound.bn.running_mean, mean)
    assert bound.bn.num_batches_tracked == 3
