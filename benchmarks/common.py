"""What the benchmarks share: the header, and how numbers are shown."""

import os
import platform
from importlib import metadata

import torch


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


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
