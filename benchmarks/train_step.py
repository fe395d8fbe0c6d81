"""Steps without options, against stock torch.compile: training, and evaluation without gradients.

    python -m benchmarks.train_step [--models cnn resnet18 bert] [--rounds N] [--json FILE] [--plot FILE]

Contenders: stock ``torch.compile`` and the backend on the eager model, the backend on a bound export, and the eager
model. All are compiled in one process, then take turns in one thread. A train step is forward, backward and SGD. CPU
time, medians; ratios are those to stock in the same turn. "peak" is what a step has allocated at once, beside what
stays: parameters, gradients and buffers.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import compile_modes as cm
from benchmarks.common import MIB, bars, finish, markdown, options, peak

CONTENDERS = ("stock", "ours", "bound", "eager")
MODES = ("train", "eval")


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "cnn":
        layers: list[nn.Module] = []
        for size in (3, 16, 32):
            layers += [nn.Conv2d(size, 2 * size, 3, padding=1), nn.BatchNorm2d(2 * size), nn.ReLU(), nn.Dropout(0.1)]
            layers += [nn.Conv2d(2 * size, {3: 16, 16: 32, 32: 64}[size], 3, stride=2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)), torch.randn(8, 3, 32, 32)
    if name == "bert":
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(8, 32, 64)
    return __import__("torchvision").models.get_model(name), torch.randn(4, 3, 64, 64)


def contenders(name: str) -> dict[str, nn.Module]:
    model, x = build(name)
    model(x)  # lazy parameters
    compiled = {}
    for contender in CONTENDERS:
        own = copy.deepcopy(model).train()
        if contender == "bound":
            own = cm.bind(torch.export.export(own, (x,)))
        # Options of their own: Dynamo takes the code of one copy for another whose compiler is the same.
        backend = {"stock": "inductor", "ours": "pt2e_modes", "bound": "pt2e_modes"}.get(contender)
        compiled[contender] = own if backend is None else torch.compile(own, backend=backend)
    return compiled


def train_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()


def measured(name: str, rounds: int) -> dict[str, dict[str, float]]:
    torch._dynamo.reset()
    x, calls = build(name)[1], contenders(name)
    found: dict[str, dict[str, float]] = {contender: {} for contender in calls}
    for mode in MODES:
        steps: dict[str, Callable[[], object]] = {}
        for contender, module in calls.items():
            module.train(mode == "train")
            optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
            train = functools.partial(train_step, module, optimizer, x)
            steps[contender] = train if mode == "train" else functools.partial(module, x)
        times: dict[str, list[float]] = {contender: [] for contender in calls}
        with torch.set_grad_enabled(mode == "train"):
            for turn in range(rounds + 3):
                for contender in list(steps)[:: -1 if turn % 2 else 1]:
                    start = time.process_time()
                    steps[contender]()
                    times[contender].append(time.process_time() - start)
        for contender, own in times.items():
            ratios = [a / b for a, b in zip(own[3:], times["stock"][3:], strict=True)]
            found[contender] |= {f"{mode}, ms": median(own[3:]) * 1e3, f"{mode}, of stock": median(ratios)}
            with torch.set_grad_enabled(mode == "train"):
                found[contender][f"{mode}, peak MiB"] = peak(steps[contender]) / MIB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet18", "bert"])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = options(parser, "torchvision", plots=True)
    figures = {name: measured(name, arguments.rounds) for name in arguments.models}
    columns = [f"{mode}, {what}" for mode in MODES for what in ("ms", "of stock", "peak MiB")]
    rows = [
        [name, contender, *(f"{own[c]:.{3 if 'of' in c else 2}f}" for c in columns)]
        for name, found in figures.items()
        for contender, own in found.items()
    ]
    print(markdown(["model", "", *columns], rows))
    shown = {c: [figures[n][c][f"{m}, of stock"] for n in figures for m in MODES] for c in CONTENDERS[1:3]}
    labels = [f"{name}, {mode}" for name in figures for mode in MODES]
    finish(arguments, figures, lambda ax: bars(ax, labels, shown, "of stock's time"))


if __name__ == "__main__":
    main()
