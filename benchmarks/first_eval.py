"""What the first eval after training costs, and the first call in a second process.

    python -m benchmarks.first_eval [--models cnn bert4 resnet18] [--tables first second] [--json FILE]

First table: a train step, then the first eval without grad, each row in a process of its own with an empty cache: cold;
after ``warmup`` of both modes; after ``warmup(background=True)``, which runs beside train steps until it is done. In
seconds on the clock; "slower" and "slowest" are steps beside the child, median and maximum, in medians of steps alone.
Second table: processes whose cache is warm, with Dynamo and Inductor imported (by compiling something else): loading
or building the model, ``torch.compile`` and the first eval call, medians over processes, in seconds of the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import compile_modes as cm
from benchmarks.common import markdown, versions
from benchmarks.first_eval_models import build

WAYS = ("cold", "warmup", "background")
KINDS = ("eager, stock", "eager, ours", "exported, stock", "bound")
STEPS = 15


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def first_eval(way: str, name: str) -> dict[str, float]:
    """Trains, and evaluates for the first time."""
    model, x = build(name)
    call: Any = torch.compile(model, backend="pt2e_modes")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate() -> None:
        with torch.no_grad():
            call(x)

    call.train()
    found = {"before": 0.0}
    if way == "warmup":
        found["before"] = timed(lambda: cm.warmup(call, x, progress=False))
    found["first step"] = timed(step)
    step()
    alone = [timed(step) for _ in range(STEPS)]
    if way == "background":
        start = time.perf_counter()
        handle = cm.warmup(call, x, background=True)
        found["before"] = time.perf_counter() - start
        beside = []
        while not handle.done:
            beside.append(timed(step))
        found |= {"child": time.perf_counter() - start, "slower": median(beside) / median(alone)}
        handle.wait()
        found["slowest"] = max(beside) / median(alone)
    call.eval()
    found["first eval"] = timed(evaluate)
    found["second eval"] = timed(evaluate)
    return found


def second_process(kind: str, name: str, folder: str) -> dict[str, float]:
    """Everything up to the first output, in a process that has compiled something else."""
    timed(lambda: torch.compile(nn.Linear(2, 2))(torch.ones(2, 2)))
    path = f"{folder}/{name}"
    model, x = build(name)
    start = time.process_time()
    if kind.startswith("eager"):
        model, _ = build(name)
    elif kind == "bound":
        model = cm.load(f"{path}.bound.pt2")
    else:
        model = torch.export.load(f"{path}.pt2").module()
    if kind != "exported, stock":  # which has been exported in eval
        model.eval()
    ours = kind in ("eager, ours", "bound")
    call: Any = torch.compile(model, backend="pt2e_modes" if ours else "inductor")
    loaded = time.process_time()
    with torch.no_grad():
        call(x)
    end = time.process_time()
    counts = torch._dynamo.utils.counters["aot_autograd"]
    return {"load": loaded - start, "first": end - loaded, "total": end - start, "hits": counts["autograd_cache_hit"]}


def write_files(name: str, folder: str) -> None:
    model, x = build(name)
    cm.save(cm.bind(torch.export.export(model.train(), (x,))), f"{folder}/{name}.bound.pt2")
    torch.export.save(torch.export.export(model.eval(), (x,)), f"{folder}/{name}.pt2")


def run(job: list[str], cache: str, threads: int) -> dict[str, float]:
    """Runs one measurement in a process of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.first_eval", "--job", *job]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(job: list[str]) -> None:
    warnings.simplefilter("ignore")
    if job[0] in WAYS:
        print(json.dumps(first_eval(job[0], job[1])))
    elif job[0] in KINDS:
        print(json.dumps(second_process(*job)))
    else:
        write_files(job[1], job[2])
        print("{}")


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ways(name: str, threads: int, figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            found = figures[f"{name}, {way}"] = run([way, name], cache, threads)
        columns = [seconds(found.get(key)) for key in ("before", "first step", "first eval", "second eval")]
        rows.append([name, way, *columns, *(seconds(found.get(key)) for key in ("child", "slower", "slowest"))])
    return rows


def kinds(name: str, threads: int, repeats: int, figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run(["files", name, folder], f"{folder}/cache", threads)
        jobs = {kind: [kind, name, folder] for kind in KINDS}
        for job in jobs.values():
            run(job, f"{folder}/cache", threads)  # fills the cache
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(repeats):
            for kind, job in jobs.items():
                runs[kind].append(run(job, f"{folder}/cache", threads))
    for kind, found in runs.items():
        figures[f"{name}, {kind}"] = found
        hit = all(f["hits"] for f in found)
        rows.append([name, kind, *(seconds(median(f[key] for f in found)) for key in ("load", "first", "total"))])
        rows[-1].append("yes" if hit else "no")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "bert4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tables", nargs="+", default=["first", "second"], choices=["first", "second"])
    parser.add_argument("--json")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return work(arguments.job)
    print(", ".join(f"{name} {version}" for name, version in versions("transformers", "torchvision").items()))
    figures: dict[str, Any] = {}
    columns = ["model", "", "call of warmup", "first step", "first eval", "second eval", "child", "slower", "slowest"]
    for name in arguments.models if "first" in arguments.tables else ():
        print(markdown(columns, ways(name, arguments.threads, figures)), flush=True)
    for name in arguments.models if "second" in arguments.tables else ():
        rows = kinds(name, arguments.threads, arguments.repeats, figures)
        print(markdown(["model", "", "load and compile()", "first call", "sum", "cache hit"], rows), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"versions": versions(), "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
