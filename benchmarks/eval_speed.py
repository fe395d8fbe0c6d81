"""Eval without gradients: eager, stock torch.compile, Inductor's freezing (stale after any write: the ceiling), ours.

    python -m benchmarks.eval_speed [--models resnet18 mobilenet_v2] [--batches 1 8] [--rounds N] [--json FILE]
        [--plot FILE]

One process, one thread, random weights, 224 px. Contenders are called in turn; medians. "auto" and "strict" are
``options={"freeze": ...}``. The error is the largest difference from eager, relative to eager's largest output. "peak"
is what a call has allocated at once, "kept" what the constants of "auto" take beside the weights.
"""

import argparse
import math
from statistics import median
from typing import Any

import torch

from benchmarks.common import MIB, bars, finish, markdown, options, peak, short
from benchmarks.eval_models import MODELS, build, contenders, settle, timed
from compile_modes.forms.deploy.running import DEPLOYED

NAMES = ("eager", "stock", "freezing", "auto", "strict")
COLUMNS = (
    "model, batch", *(f"{name}, ms" for name in NAMES),
    "stock / auto", "freezing / auto", "error", "peak of stock, MiB", "of auto", "kept, MiB",
)  # fmt: skip


def measured(name: str, batch: int, rounds: int, size: int) -> dict[str, Any]:
    x = torch.randn(batch, 3, size, size)
    calls = contenders(build(name, size))
    compile_s = {n: settle(n, call, x) for n, (call, _) in calls.items()}
    times: dict[str, list[float]] = {n: [] for n in calls}
    for _ in range(rounds):
        for n, (call, _) in calls.items():
            times[n].append(timed(call, x))
    expected = calls["eager"][0](x)
    error = ((calls["auto"][0](x) - expected).abs().max() / expected.abs().max()).item()
    ms = {n: median(t) for n, t in times.items()}
    peaks = {n: peak(lambda n=n: calls[n][0](x)) / MIB for n in ("stock", "auto")}  # type: ignore[misc]
    kept = next(g.sets[0].nbytes for g in DEPLOYED if g.sets) / MIB
    return {"ms": ms, "first_calls_s": compile_s, "error": error, "peaks": peaks, "kept": kept}


def row(label: str, found: dict[str, Any]) -> list[str]:
    ms = found["ms"]
    ratios = [f"{ms['stock'] / ms['auto']:.2f}", f"{ms['freezing'] / ms['auto']:.2f}"]
    return [
        label,
        *(short(ms[name]) if ms[name] < 10 else f"{ms[name]:.1f}" for name in NAMES),
        *ratios,
        f"{found['error']:.0e}",
        *(f"{own:.1f}" for own in found["peaks"].values()),
        f"{found['kept']:.1f}",
    ]


def mean(figures: dict[str, dict[str, Any]], batch: int, peer: str) -> str:
    ratios = [f["ms"][peer] / f["ms"]["auto"] for label, f in figures.items() if label.endswith(f", {batch}")]
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"


def draw(axes: Any, figures: dict[str, dict[str, Any]]) -> None:
    speeds = {n: [f["ms"]["stock"] / f["ms"][n] for f in figures.values()] for n in ("freezing", "auto", "strict")}
    bars(axes, list(figures), speeds, "times the speed of stock torch.compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=224)
    arguments = options(parser, "torchvision", plots=True)
    figures = {}
    with torch.no_grad():
        for name in arguments.models:
            for batch in arguments.batches:
                torch._dynamo.reset()
                figures[f"{name}, {batch}"] = found = measured(name, batch, arguments.rounds, arguments.size)
                print(" ".join(row(f"{name}, {batch}", found)), flush=True)
    print(markdown(list(COLUMNS), [row(label, found) for label, found in figures.items()]))
    for batch in arguments.batches:
        means = f"{mean(figures, batch, 'stock')} over stock, {mean(figures, batch, 'freezing')} over freezing"
        print(f"geometric means, batch {batch}: auto is {means}")
    finish(arguments, figures, lambda ax: draw(ax, figures))


if __name__ == "__main__":
    main()
