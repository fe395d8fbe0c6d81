"""What sites, bind, set_mode, bake and explain cost per node of a program, for programs of several sizes.

    python -m benchmarks.rewrite_scaling [--nodes 1000 4000 17000] [--repeats N] [--json FILE]

A program is a chain of blocks (linear, batch norm, dropout, ReLU, a residual), 13 nodes each with their parameters, a
quarter of them sites or counters. Each repetition starts from a fresh ``program.module()``, which is not counted.
torch's own ``recompile()``, which every edit needs, is counted, and has a column of its own. Medians of CPU time;
microseconds per node. A cost that grows faster than the program shows as a figure that grows from row to row.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compile_modes as cm
from benchmarks.common import markdown, versions

COLUMNS = ("sites", "bind", "explain", "set_mode", "bake", "recompile")


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(features, features), nn.BatchNorm1d(features), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.drop(self.bn(self.fc(x))))


def program(nodes: int) -> torch.export.ExportedProgram:
    """A program in train mode whose module has about so many nodes."""
    blocks = nn.Sequential(*(Block(4) for _ in range(max(nodes // 13, 1))))
    return torch.export.export(blocks.train(), (torch.randn(8, 4),))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def once(ep: torch.export.ExportedProgram) -> dict[str, float]:
    """Seconds per node of each request, on a module of its own."""
    module = ep.module()
    nodes = len(module.graph.nodes)
    seconds = {"sites": timed(lambda: cm.sites(module))[0]}
    seconds["explain"] = timed(lambda: cm.explain(module))[0]
    plain = ep.module()
    seconds["set_mode"], report = timed(lambda: cm.set_mode(plain, False))
    assert report.changed
    assert not report.refused
    seconds["recompile"] = timed(plain.recompile)[0]
    seconds["bind"], bound = timed(lambda: cm.bind(module))
    bound.eval()
    seconds["bake"] = timed(lambda: cm.bake(bound))[0]
    assert all(not site.training for site in cm.sites(bound))
    return {name: 1e6 * value / nodes for name, value in seconds.items()}


def measure(nodes: int, repeats: int) -> dict[str, Any]:
    ep = program(nodes)
    runs = [once(ep) for _ in range(repeats + 1)][1:]  # the first fills torch's caches of imports and schemas
    return {"nodes": len(ep.module().graph.nodes), **{name: median(run[name] for run in runs) for name in COLUMNS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 4000, 17000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore", cm.ModeWarning)
    rows = [measure(nodes, args.repeats) for nodes in args.nodes]
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(markdown(["nodes", *COLUMNS], [[str(r["nodes"]), *(f"{r[c]:.0f}" for c in COLUMNS)] for r in rows]))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"versions": versions(), "microseconds per node": rows}, stream, indent=2)


if __name__ == "__main__":
    main()
