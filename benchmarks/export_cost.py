"""What cm.export costs, against two stock exports of the same model: where flags suffice, and where Python decides.

    python -m benchmarks.export_cost [--repeats N] [--json FILE]

Both are taken in turn, in one process and one thread. Medians of CPU time, and how often torch.export.export was run.
"without verify" is ``verify=False``: then the result is not run beside the model.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compile_modes as cm
from benchmarks.common import finish, markdown, options

COLUMNS = ("two stock exports, s", "exports", "cm.export, ratio", "without verify, ratio")


class Codebook(nn.Module):
    """Statistics that only training updates."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.flatten(0, -2).mean(0), 0.1)
        return x - self.mean.clone()


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def encoder(*more: Callable[[], nn.Module]) -> nn.Module:
    """Eight transformer layers, each followed by what is given."""
    parts: list[nn.Module] = []
    for _ in range(8):
        parts += [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1), *(make() for make in more)]
    return nn.Sequential(*parts)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "8 layers, flags only": lambda: encoder(),
    "and a codebook behind each": lambda: encoder(lambda: Codebook(32)),
    "and noise behind each": lambda: encoder(Jitter),
    "and both": lambda: encoder(lambda: Codebook(32), Jitter),
}
X = torch.randn(4, 16, 32)


class Counting:
    """torch.export.export, and how often it was called."""

    def __init__(self) -> None:
        self.stock, self.calls = torch.export.export, 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        self.calls += 1
        return self.stock(*args, **kwargs)


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(build: Callable[[], nn.Module], repeats: int) -> dict[str, float]:
    model, rows = build(), []
    counting = Counting()
    torch.export.export = counting
    try:
        for _ in range(repeats + 1):  # the first one warms up
            stock = sum(timed(lambda m=m: counting.stock(model.train(m), (X,), strict=False)) for m in (True, False))
            counting.calls = 0
            ours = timed(lambda: cm.export(model, (X,), progress=False))
            exports = counting.calls
            unverified = timed(lambda: cm.export(model, (X,), verify=False, progress=False))
            rows.append((stock, exports, ours / stock, unverified / stock))
    finally:
        torch.export.export = counting.stock
    return dict(zip(COLUMNS, (median(column) for column in zip(*rows[1:], strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = options(parser)
    figures = {name: measured(build, arguments.repeats) for name, build in MODELS.items()}
    rows = [[name, *(f"{figures[name][c]:.3g}" for c in COLUMNS)] for name in MODELS]
    print(markdown(("model", *COLUMNS), rows))
    finish(arguments, figures)


if __name__ == "__main__":
    main()
