"""What it costs to keep frozen weights fresh: computing constants again, the check at each call, and memory.

    python -m benchmarks.refresh [--models resnet18 mobilenet_v2] [--rounds N] [--json FILE]

One process, one thread, batch 1, 224 px, ``freeze="auto"``. "all" is the first call on constants after a write to every
parameter, less a call that has nothing to compute; "one layer" after a write to the last layer's bias. "pays after" is
how many calls win that time back against stock. "check" is what each call spends on looking at weights. "first" is what
the frozen form costs once, compiling included.
"""

import argparse
import time
from statistics import median

import torch

from benchmarks.common import finish, markdown, options
from benchmarks.eval_models import MODELS, build, timed
from compile_modes.forms.deploy.running import DEPLOYED
from compile_modes.forms.deploy.sets import RESTED

COLUMNS = (
    "model", "stock call, ms", "call, ms", "all, ms", "one layer, ms", "pays after, calls", "check, us",
    "strict check, ms", "first, s", "weights, MB", "constants, MB",
)  # fmt: skip


def measured(name: str, rounds: int, size: int) -> dict[str, float]:
    from compile_modes.forms.deploy.snapshot import Snapshot

    model, x = build(name, size), torch.randn(1, 3, size, size)
    call = torch.compile(model, backend="pt2e_modes", options={"freeze": "auto"})
    stock, ours, whole, part = [], [], [], []
    for _ in range(RESTED):
        call(x)
    start = time.perf_counter()
    call(x)
    first = time.perf_counter() - start
    (graph,) = [graph for graph in DEPLOYED if graph.sets]
    *_, last = model.parameters()
    for number in range(rounds):
        for tensor in model.parameters() if number % 2 else [last]:
            tensor.mul_(1.0)
        stock += [timed(call, x) for _ in range(RESTED)]
        (whole if number % 2 else part).append(timed(call, x))
        ours += [timed(call, x) for _ in range(RESTED)]
    weights = [*model.parameters(), *(b for b in model.buffers() if b.dim())]
    snapshots = [Snapshot(weights, strict=strict) for strict in (False, True)]
    checks = [median(timed(snapshot.same, weights) for _ in range(30)) for snapshot in snapshots]
    call_ms, stock_ms = median(ours), median(stock)
    all_ms = median(whole) - call_ms
    gain = stock_ms - call_ms
    return {
        "stock call, ms": stock_ms,
        "call, ms": call_ms,
        "all, ms": all_ms,
        "one layer, ms": max(median(part) - call_ms, 0.0),
        "pays after, calls": all_ms / gain if gain > 0 else float("inf"),
        "check, us": checks[0] * 1e3,
        "strict check, ms": checks[1],
        "first, s": first,
        "weights, MB": sum(w.nbytes for w in weights) / 1e6,
        "constants, MB": graph.sets[0].nbytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=224)
    arguments = options(parser, "torchvision")
    figures = {}
    with torch.no_grad():
        for name in arguments.models:
            torch._dynamo.reset()
            figures[name] = measured(name, arguments.rounds, arguments.size)
    rows = [[name, *(f"{found[column]:.3g}" for column in COLUMNS[1:])] for name, found in figures.items()]
    print(markdown(list(COLUMNS), rows))
    finish(arguments, figures)


if __name__ == "__main__":
    main()
