"""What the benchmarks share: the header, and how figures are shown and kept."""

import argparse
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def versions(*packages: str) -> dict[str, str]:
    """What is installed of torch and ``packages``, and on what it runs."""
    found = {"torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version(), "cores": str(os.cpu_count())}


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that something has allocated at once, by the profiler's record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def options(parser: argparse.ArgumentParser, *packages: str, plots: bool = False) -> argparse.Namespace:
    """Parses the command line, with what all benchmarks take; prints the header, and stays in one thread, silent."""
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    if plots:
        parser.add_argument("--plot", metavar="FILE", help="where to draw them, as a PNG; needs matplotlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arguments.versions = versions(*packages)
    print(", ".join(f"{name} {version}" for name, version in arguments.versions.items()), flush=True)
    return arguments


def finish(arguments: argparse.Namespace, figures: Any, draw: Callable[[Any], None] | None = None) -> None:
    """Writes figures as JSON and as a picture, where the command line asks for it.

    Args:
        arguments: those of :func:`options`.
        figures: what was measured.
        draw: draws it on axes of matplotlib.
    """
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"versions": arguments.versions, "figures": figures}, file, indent=2)
    if draw is not None and arguments.plot:
        pyplot = __import__("matplotlib.pyplot").pyplot
        figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
        draw(axes)
        figure.savefig(arguments.plot, dpi=80)
        pyplot.close(figure)


def bars(axes: Any, labels: Sequence[str], values: Mapping[str, Sequence[float]], what: str) -> None:
    """Horizontal bars, a group for each label, with a line at 1 where they are ratios."""
    height = 0.8 / len(values)
    for number, (name, own) in enumerate(values.items()):
        places = [place + number * height for place in range(len(labels))]
        axes.bar_label(axes.barh(places, own, height, label=name), fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(what, fontsize=8)
    axes.margins(x=0.12)
    if len(values) > 1:
        axes.axvline(1.0, color="black", linewidth=0.6)
        axes.legend(fontsize=7, ncols=len(values), loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
