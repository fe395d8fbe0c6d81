"""What n stochastic passes cost: cm.sample, the loop, the compiled loop, and a batch repeated by hand.

    python -m benchmarks.sampling [--models NAME ...] [--repetitions N] [--no-inductor] [--json FILE] [--plot FILE]
    python -m benchmarks.sampling --curve FILE     # the picture of docs/mc-dropout.md

"by hand" repeats the whole input n times along the batch and calls the eager model once: the deterministic part is
computed n times, and what is one mask for a batch would be one for all repetitions. All in one thread, without
gradients. Medians of ``--repeats`` calls, contenders in turn; "first call" is what sample's first call took. Nothing
is compiled for sample itself but in the last column.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compile_modes as cm
from benchmarks.common import bars, finish, markdown, options, short


class Head(nn.Module):
    """resnet18 with dropout before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = __import__("torchvision").models.resnet18(num_classes=10)
        self.body.fc = nn.Sequential(nn.Dropout(0.5), self.body.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def bert() -> nn.Module:
    transformers = __import__("transformers")
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512, vocab_size=1000
    )
    return transformers.BertForSequenceClassification(config)


def mlp() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1)) for _ in range(6)]
    return nn.Sequential(*blocks, nn.Linear(64, 2))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18, dropout in the head, batch 4 of 64x64": lambda: (Head(), torch.randn(4, 3, 64, 64)),
    "BERT-4 (width 128), dropout everywhere, 1 sequence of 16": lambda: (bert(), torch.randint(0, 1000, (1, 16))),
    "MLP of 6 blocks, dropout in each, batch 16": lambda: (mlp(), torch.randn(16, 64)),
}


COLUMNS = ("eager loop", "compiled loop", "by hand", "sample", "sample, compiled")


def stochastic(model: nn.Module) -> nn.Module:
    """In eval, but for what draws random numbers: the loop's way, by hand."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "SelfAttention" in type(module).__name__:
            module.training = True
    return model


def outputs(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


def contenders(model: nn.Module, x: Tensor, n: int, *, inductor: bool) -> dict[str, Callable[[], Any]]:
    stochastic(model)
    repeated = x.repeat(n, *[1] * (x.dim() - 1))
    calls: dict[str, Callable[[], Any]] = {
        "eager loop": lambda: torch.stack([outputs(model(x)) for _ in range(n)]),
        "by hand": lambda: outputs(model(repeated)).unflatten(0, (n, len(x))),
        "sample": lambda: cm.sample(model, x, n=n),
    }
    if inductor:
        compiled = torch.compile(model)
        calls["compiled loop"] = lambda: torch.stack([outputs(compiled(x)) for _ in range(n)])
        calls["sample, compiled"] = lambda: cm.sample(compiled, x, n=n)
    return calls


def measure(name: str, n: int, repeats: int, *, inductor: bool) -> dict[str, float]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    calls = contenders(model, x, n, inductor=inductor)
    times: dict[str, list[float]] = {what: [] for what in calls}
    figures = {}
    with torch.no_grad():
        for what, call in calls.items():
            start = time.perf_counter()
            call()
            figures[f"first call, {what}"] = time.perf_counter() - start
            call()
        for _ in range(repeats):
            for what, call in calls.items():
                start = time.perf_counter()
                call()
                times[what].append(time.perf_counter() - start)
    return figures | {what: median(own) for what, own in times.items()}


def draw_curve(path: str) -> None:
    """Draws what docs/mc-dropout.md computes: a curve, fitted from -2 to 2, and two deviations around it."""
    pyplot = __import__("matplotlib.pyplot").pyplot
    torch.manual_seed(0)
    hidden = (nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))
    curve = nn.Sequential(nn.Linear(1, 64), *hidden, nn.Linear(64, 1))
    seen, grid = torch.linspace(-2, 2, 64)[:, None], torch.linspace(-6, 6, 121)[:, None]
    optimizer = torch.optim.Adam(curve.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (curve(seen) - torch.sin(2 * seen)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        mean, deviation = cm.sample(curve, grid, n=100, reduce="mean_std", seed=0)
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(grid, mean, label="mean of 100 samples")
    low, high = ((mean + side * deviation)[:, 0] for side in (-2, 2))
    axes.fill_between(grid[:, 0], low, high, alpha=0.3, label="2 deviations")
    axes.plot(seen, torch.sin(2 * seen), "k--", linewidth=1, label="what it was fitted to")
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="beginnings of names")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--curve", metavar="FILE", help="where to draw the picture of docs/mc-dropout.md")
    arguments = options(parser, "torchvision", "transformers", plots=True)
    if arguments.curve:
        draw_curve(arguments.curve)
        return
    names = [name for name in MODELS if name.startswith(tuple(arguments.models))]
    inductor = not arguments.no_inductor
    n, repeats = arguments.repetitions, arguments.repeats
    figures = {name: measure(name, n, repeats, inductor=inductor) for name in names}
    columns = [c for c in COLUMNS if c in figures[names[0]]]
    rows = []
    for name, own in figures.items():
        loop = own["eager loop"]
        ratios = ["" if c == "eager loop" else f" ({loop / own[c]:.1f}x)" for c in columns]
        cells = [f"{short(own[c] * 1e3)} ms{ratio}" for c, ratio in zip(columns, ratios, strict=True)]
        rows.append([name, *cells, f"{own['first call, sample']:.1f} s"])
    print(f"n = {n}\n\n" + markdown(["", *columns, "first call of sample"], rows))

    def draw(axes: Any) -> None:
        values = {c: [own["eager loop"] / own[c] for own in figures.values()] for c in columns if c != "eager loop"}
        axes.set_xscale("log")
        bars(axes, [name.split(",")[0] for name in figures], values, f"times faster than the eager loop, n = {n}")

    finish(arguments, figures, draw)


if __name__ == "__main__":
    main()
