"""What a call costs beside the computing, in nothing but mode-dependent modules: compiled and eager, by their number.

    python -m benchmarks.call_overhead [--owners 1 100 1000] [--repeats N] [--json FILE] [--plot FILE]

Compiled contenders run a backend that computes nothing, so that what is left is the way into the compiled code: hooks,
arguments, guards. All take turns in one process and one thread; the least of each is taken, for the rest is other work
on the machine. Microseconds.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import compile_modes as cm
from benchmarks.common import bars, finish, markdown, options

COLUMNS = ("eager model", "ep.module()", "bound", "compiled model", "compiled ep.module()", "compiled bound", "ratio")
X = torch.randn(4, 4)


class Dropouts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for drop in self.drops:
            x = drop(x)
        return x


def nothing(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., tuple[Any]]:
    """A backend whose code hands its input back."""
    place = next(i for i, value in enumerate(example_inputs) if isinstance(value, Tensor) and value.shape == X.shape)
    return lambda *args: (args[place],)


def contenders(count: int) -> dict[str, Callable[[Tensor], Any]]:
    model = Dropouts(count)
    stock = torch.export.export(model, (X,)).module()
    bound = cm.bind(torch.export.export(model, (X,)))
    found: dict[str, Callable[[Tensor], Any]] = {"eager model": model, "ep.module()": stock, "bound": bound}
    # Modules of their own, and a code object of its own for the model: Dynamo would look through entries of others.
    for name, module in (
        ("compiled model", Dropouts(count)),
        ("compiled ep.module()", torch.export.export(model, (X,)).module()),
        ("compiled bound", cm.bind(torch.export.export(model, (X,)))),
    ):
        found[name] = torch.compile(module, backend=nothing)
    return found


def measured(count: int, repeats: int) -> dict[str, float]:
    torch._dynamo.reset()
    calls = contenders(count)
    least = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for call in calls.values():
            for _ in range(10):
                call(X)
        for _ in range(repeats):
            for name, call in calls.items():
                number = 200 if name.startswith("compiled") else max(2, 200 // count)
                start = time.perf_counter()
                for _ in range(number):
                    call(X)
                least[name] = min(least[name], (time.perf_counter() - start) / number * 1e6)
    return {**least, "ratio": least["compiled bound"] / least["compiled model"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--repeats", type=int, default=40)
    arguments = options(parser, plots=True)
    figures = {str(count): measured(count, arguments.repeats) for count in arguments.owners}
    rows = [[count, *(f"{own[c]:.{2 if c == 'ratio' else 1}f}" for c in COLUMNS)] for count, own in figures.items()]
    print(markdown(["owners", *COLUMNS], rows))
    compiled = COLUMNS[3:6]
    shown = {c: [figures[n][c] / figures[n]["compiled model"] for n in figures] for c in compiled}
    finish(arguments, figures, lambda ax: bars(ax, [f"{n} owners" for n in figures], shown, "of the compiled model's"))


if __name__ == "__main__":
    main()
