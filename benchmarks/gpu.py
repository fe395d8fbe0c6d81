"""Train steps, evaluation, flips and compile times on a GPU: this project, stock Inductor, freezing, eager, torchao.

    python -m benchmarks.gpu [--budget SECONDS] [--resume] [--json FILE]
    python -m benchmarks.gpu --smoke    # a tiny model, on the CPU if there is no GPU

Each model and dtype is one row. Its contenders compile at the same time, each in a process with empty caches (not in a
smoke run) and its share of the cores; then they are timed in turns while the others wait. What doesn't fit into the
budget is left out, what fails is named, and ``--resume`` runs what the last run on this device has left out.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.common import markdown, short, versions
from benchmarks.gpu_worker import BATCH, CONTENDERS, TOKENS, Task
from benchmarks.gpu_worker import main as work

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16", "bert_base")
DTYPES = ("bfloat16", "float32")
PACKAGES = ("triton", "torchvision", "timm", "transformers", "torchao")
ROUNDS, SECONDS = 3, 0.4  # turns of each contender in each mode, and how long each lasts
FLIPS, FLIPPING = 10, 15.0  # timed flips of each contender, fewer if they take longer than so many seconds
MEASURING = 40.0  # kept from the budget for timing what has compiled
# Who is shown in which column, in this order.
TRAIN = ("ours", "bound", "stock", "eager", "torchao")
EVAL = ("ours", "bound", "stock", "freezing", "eager", "torchao")
FLIP = COMPILE_TRAIN = ("ours", "bound", "stock", "torchao")
COMPILE_EVAL = ("ours", "bound", "stock", "freezing", "torchao")
WRONG = 0.05  # of the largest output: beyond what bfloat16 explains
NOT_YET = "Not yet run on a GPU."


@dataclass
class Result:
    """What was measured of one contender on one model."""

    model: str
    dtype: str
    contender: str
    status: str = "not run"  # or "ok", "failed"
    why: str = ""
    first_call_s: dict[str, float] = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)
    flip_ms: float | None = None
    after_flip_ms: dict[str, float] = field(default_factory=dict)
    compiles_per_flip: float | None = None
    eval_error: float | None = None
    quartiles_ms: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Worker:
    """A contender's process."""

    result: Result
    process: Any
    connection: Connection
    samples: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "eval": []})

    def ask(self, *order: Any) -> None:
        """Sends an order; whether it came through shows in the answer."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(order)

    def answer(self, deadline: float) -> Any:
        """The reply, or None if there is none: the result then says why."""
        if not self.connection.poll(max(0.0, deadline - time.monotonic())):
            return self.fail("not run", "the budget was spent")
        try:
            good, reply = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            return self.fail("failed", f"the process ended with {self.process.exitcode}")
        return reply if good else self.fail("failed", reply)

    def fail(self, status: str, why: str) -> None:
        self.result.status, self.result.why = status, why
        self.end(patience=0)

    def end(self, patience: float) -> None:
        """Lets the process go, or makes it."""
        if patience:
            with contextlib.suppress(BrokenPipeError):
                self.connection.send(None)
            self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.connection.close()

    @property
    def alive(self) -> bool:
        return not self.connection.closed


def start(result: Result, device: str, cache: str, threads: int) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    task = Task(result.model, result.dtype, result.contender, device)
    process = context.Process(target=work, args=(theirs, task, cache, threads), daemon=True)
    process.start()
    theirs.close()
    worker = Worker(result, process, ours)
    worker.ask("compile")
    return worker


def measure(group: list[Result], device: str, deadline: float, *, cold: bool) -> None:
    """All contenders of one model and dtype; with empty caches if ``cold``."""
    for result in group:
        if result.contender == "torchao" and versions("torchao")["torchao"] == "not installed":
            result.status, result.why = "failed", "not installed"
    group = [result for result in group if not result.why]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(group)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        workers = [start(r, device, f"{cache}/{r.contender}" if cold else "", threads) for r in group]
        try:
            wait_for_all(workers, deadline - MEASURING)
            for worker in workers:
                compiled(worker.result, worker.answer(deadline=0.0))
            time_in_turns([w for w in workers if w.alive], deadline)
        finally:
            for worker in workers:
                if worker.alive:
                    worker.end(patience=10)


def wait_for_all(workers: list[Worker], deadline: float) -> None:
    """Returns when all have answered, or at the deadline."""
    missing = {worker.connection for worker in workers}
    while missing and time.monotonic() < deadline:
        missing.difference_update(wait(list(missing), timeout=max(0.0, deadline - time.monotonic())))


def compiled(result: Result, reply: dict[str, Any] | None) -> None:
    if reply is not None:
        result.eval_error = reply["eval_error"]
        result.first_call_s = reply["first_call_s"]


def time_in_turns(workers: list[Worker], deadline: float) -> None:
    for _ in range(ROUNDS):
        for mode in ("train", "eval"):
            for worker in workers:
                if worker.alive and mode in worker.result.first_call_s:
                    worker.ask("samples", mode, SECONDS)
                    found = worker.answer(deadline)
                    worker.samples[mode] += found or []
    for worker in workers:
        result = worker.result
        if not worker.alive:
            continue
        result.quartiles_ms = {mode: quantiles(times) for mode, times in worker.samples.items() if times}
        result.step_ms = {mode: times[1] for mode, times in result.quartiles_ms.items()}
        if len(result.step_ms) == 2:
            worker.ask("flips", FLIPS, FLIPPING)
            found = worker.answer(deadline)
            if found is None:
                continue
            result.flip_ms = median(found["flips_ms"])
            result.after_flip_ms = {mode: median(times) for mode, times in found["after_flip_ms"].items()}
            result.compiles_per_flip = found["compiles_per_flip"]
        result.status = "ok"


def table(results: list[dict[str, Any]]) -> str:
    """One row per model and dtype; in each cell, the contenders in the order of the column's title."""
    columns: list[tuple[str, tuple[str, ...], Callable[[dict[str, Any]], float | None]]] = [
        ("train step, ms", TRAIN, lambda r: r["step_ms"].get("train")),
        ("eval, ms", EVAL, lambda r: r["step_ms"].get("eval")),
        ("flip to train, and first step, ms", FLIP, flip_and_step),
        ("first train step, s", COMPILE_TRAIN, lambda r: r["first_call_s"].get("train")),
        ("first eval, s", COMPILE_EVAL, lambda r: r["first_call_s"].get("eval")),
    ]
    rows = []
    for model, dtype in dict.fromkeys((r["model"], r["dtype"]) for r in results):
        found = {r["contender"]: r for r in results if (r["model"], r["dtype"]) == (model, dtype)}
        size = f"{BATCH[model]}x{TOKENS}" if model == "bert_base" else str(BATCH[model])
        rows.append([f"{model}, {dtype}, batch {size}", *(cell(found, names, read) for _, names, read in columns)])
    return markdown(["", *(f"{title}: {' / '.join(names)}" for title, names, _ in columns)], rows)


def flip_and_step(result: dict[str, Any]) -> float | None:
    return None if result["flip_ms"] is None else result["flip_ms"] + result["after_flip_ms"]["train"]


def cell(
    found: dict[str, dict[str, Any]], names: tuple[str, ...], read: Callable[[dict[str, Any]], float | None]
) -> str:
    parts = []
    for name in names:
        result = found.get(name, {"status": "not run"})
        value = read(result) if result["status"] == "ok" else None
        parts.append(result["status"] if result["status"] != "ok" else "-" if value is None else short(value))
    return "not run" if set(parts) == {"not run"} else " / ".join(parts)


def notes(results: list[dict[str, Any]]) -> list[str]:
    """Why cells have no number, and what the numbers don't show."""
    lines = []
    for r in results:
        name = f"{r['model']}, {r['dtype']}, {r['contender']}"
        if r["status"] != "ok":
            lines.append(f"{name}: {r['status']}: {r['why']}")
            continue
        if r["compiles_per_flip"]:
            lines.append(f"{name}: {r['compiles_per_flip']:.2g} graphs compiled per flip")
        if r["eval_error"] is not None and not r["eval_error"] <= WRONG:  # NaN is wrong, too
            lines.append(f"{name}: its first eval is off eager's by {r['eval_error']:.2g} of the largest output")
    return lines


def quote(run: dict[str, Any] | None) -> str:
    """What the README says of a run, or of there being none."""
    if run is None:
        return NOT_YET
    head = ", ".join(f"{key} {value}" for key, value in run["head"].items())
    return f"{head}:\n\n{table(run['results'])}"


def newest() -> dict[str, Any] | None:
    """The last run on any GPU."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return max(runs, key=lambda run: run["head"]["date"], default=None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budget", type=float, default=480, help="seconds; what doesn't fit is not run (default 480)")
    parser.add_argument("--resume", action="store_true", help="run what the last run on this device has not")
    parser.add_argument("--json", metavar="FILE", help="where to write (default benchmarks/results/DEVICE.json)")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--smoke", action="store_true", help="a tiny model; writes only where --json says")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False; --smoke runs a tiny model on the CPU")
    args.models = args.models or (["tiny"] if args.smoke else list(MODELS))
    args.dtypes = args.dtypes or (["float32"] if args.smoke else list(DTYPES))
    return args


def planned(args: argparse.Namespace, before: list[dict[str, Any]]) -> list[Result]:
    """What is to be run, or with ``--resume`` has been, and what else has been measured with the same versions."""
    measured = {(r["model"], r["dtype"], r["contender"]): Result(**r) for r in before if r["status"] == "ok"}
    asked = {(m, d, c): Result(m, d, c) for d in args.dtypes for m in args.models for c in args.contenders}
    return list(({**asked, **measured} if args.resume else {**measured, **asked}).values())


def main() -> None:
    args = arguments()
    deadline = time.monotonic() + args.budget
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    head = {"device": name} | versions(*PACKAGES)
    head |= {"cuda": str(torch.version.cuda)} if device == "cuda" else {}
    path = Path(args.json) if args.json else RESULTS / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    last = json.loads(path.read_text()) if path.exists() else None
    same = last is not None and {**last["head"], "date": ""} == {**head, "date": ""}
    results = planned(args, last["results"] if last is not None and same else [])
    print(", ".join(f"{key} {value}" for key, value in head.items()), flush=True)
    for model, dtype in dict.fromkeys((r.model, r.dtype) for r in results):
        group = [r for r in results if (r.model, r.dtype) == (model, dtype) and r.status != "ok"]
        if not group:
            continue
        if time.monotonic() + MEASURING > deadline:
            for result in group:
                result.why = "the budget was spent"
            continue
        print(f"{model}, {dtype} ...", file=sys.stderr, flush=True)
        measure(group, device, deadline, cold=not args.smoke)
        write(args, path, head, results)
    write(args, path, head, results)
    rows = [asdict(result) for result in results]
    print("\n".join([table(rows), *notes(rows)]))


def write(args: argparse.Namespace, path: Path, head: dict[str, str], results: list[Result]) -> None:
    """After every row, so that a run that is cut off has left what it measured."""
    if args.smoke and not args.json:
        return
    path.parent.mkdir(exist_ok=True)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"head": {**head, "date": date}, "results": [asdict(r) for r in results]}, indent=1)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
