"""Nets to fine-tune, and eager twins with adapters of PEFT's formula, written out."""

import copy
import functools

import torch
from torch import nn

import compile_modes as cm

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
BATCH = ({0: torch.export.Dim.AUTO},)


class Tuned(nn.Module):
    """Convolutions (strided, grouped, dilated), norms, dropouts and linears, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4, momentum=0.3)
        self.wide = nn.Conv2d(4, 4, 3, dilation=2, padding=2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1, bias=False)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 6, bias=False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.grouped(self.wide(x)).mean((2, 3))
        x = self.drop(torch.relu(self.fc1(x)))
        return self.head(self.fc2(self.fc2(x)))


class Lora(nn.Module):
    """``base(x) + b(a(dropout(x))) * scale``."""

    def __init__(self, base: nn.Module, a: nn.Module, b: nn.Module, p: float, scale: float) -> None:
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, copy.deepcopy(a), copy.deepcopy(b)
        self.lora_dropout, self.scale = nn.Dropout(p), scale
        if isinstance(base, nn.Conv2d):  # those of a bound module hold weights only; the graph knows the rest
            self.lora_A.stride, self.lora_A.padding, self.lora_A.dilation = base.stride, base.padding, base.dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scale


def bound(model: nn.Module, x: torch.Tensor = X, *, train: bool = True, **kwargs) -> nn.Module:
    program = torch.export.export(copy.deepcopy(model).train(train), (x,), **kwargs)
    return cm.bind(program)


@functools.cache
def program() -> torch.export.ExportedProgram:
    """One program, for tests of calls that change nothing."""
    return torch.export.export(Tuned(), (X,))


def wake(module: nn.Module) -> None:
    """Gives the second factors other values than zero, so that adapters do something."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def twin(model: nn.Module, tuned: nn.Module, names: list[str], p: float, scale: float) -> nn.Module:
    """The eager model with adapters of the values that a bound module has."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        ours = tuned.get_submodule(name)
        model.set_submodule(name, Lora(model.get_submodule(name), ours.lora_A, ours.lora_B, p, scale))
    return model


def steps(modules, x: torch.Tensor, count: int, seed: int = 0, lr: float = 0.1) -> float:
    """Trains modules side by side, in turns of train and eval; the largest difference of any output to the first's."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr, momentum=0.9) for m in modules]
    worst = 0.0
    for step in range(count):
        outputs = []
        for module, optimizer in zip(modules, optimizers, strict=True):
            module.train(step % 4 != 3)
            torch.manual_seed(seed + step)
            outputs.append(module(x))
            if module.training:
                optimizer.zero_grad()
                outputs[-1].square().mean().backward()
                optimizer.step()
        worst = max([worst, *((o - outputs[0]).abs().max().item() for o in outputs)])
    return worst
