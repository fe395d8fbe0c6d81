"""What modes as data cost in a call, and what they save in compilations, against guards on every mode.

    python -m benchmarks.modes_data [--repeats N] [--vectors N] [--no-vectors] [--json FILE]

Calls: the model compiled by ``pt2e_modes`` without options ("guards") and with ``modes="data"``, in one process and one
thread, each with code of its own so that neither waits for the guards of the other. They take turns; times are medians
in CPU time, ratios those of one turn. "step" is forward and backward, "call" is under ``no_grad``.

Vectors: random modes of the six dropouts of the MLP, each run once, forward and backward, from an empty cache: without
options (Dynamo compiles 8, then runs in eager mode), with ``mode_vectors`` (all are compiled), and as data.
"""

import argparse
import copy
import tempfile
import time
import types
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from benchmarks.common import finish, markdown, options

COLUMNS = ["model", "", "guards, us", "data, us", "of guards"]


class MLP(nn.Module):
    """Six linear layers, each with a ReLU and a dropout behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1)) for _ in range(6)]
        self.layers = nn.Sequential(*[part for layer in layers for part in layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Bert(nn.Module):
    """Four layers of BERT, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        transformers = __import__("transformers")
        config = transformers.BertConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
        )  # fmt: skip
        self.bert = transformers.BertModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(x).last_hidden_state  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "MLP, 16 wide, batch 32": (lambda: MLP(16), torch.randn(32, 16)),
    "MLP, 512 wide, batch 128": (lambda: MLP(512), torch.randn(128, 512)),
    "BERT, 4 layers, 4 x 128": (Bert, torch.randint(0, 1000, (4, 128))),
}


def apart(model: nn.Module) -> nn.Module:
    """A copy of a model, in a module whose code Dynamo knows from no other."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    def forward(self: Any, x: Tensor) -> Any:
        return self.inner(x)

    Outer.forward = types.FunctionType(forward.__code__.replace(), globals())  # type: ignore[assignment]
    return Outer(copy.deepcopy(model))


def step(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    call(x).sum().backward()


def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        call(x)


def timed(run: Callable[[], None], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def calls(make: Callable[[], nn.Module], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """By what is run, the median times of both and their ratio."""
    torch.manual_seed(0)
    model = make()
    own = {name: apart(model) for name in ("guards", "data")}
    compiled = {
        name: torch.compile(module, backend="pt2e_modes", options={"modes": "data"} if name == "data" else {})
        for name, module in own.items()
    }
    found = {}
    for what, run in (("call", forward), ("step", step)):
        for mode in (False, True):
            runs = {name: (lambda call=call: run(call, x)) for name, call in compiled.items()}  # noqa: B023
            for name, module in own.items():
                module.train(mode)
                timed(runs[name], 3)
            times = max(1, int(0.005 / timed(runs["guards"], 3)))
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(repeats):
                for name in list(runs)[:: -1 if turn % 2 else 1]:
                    taken[name].append(timed(runs[name], times))
            ratios = [a / b for a, b in zip(taken["data"], taken["guards"], strict=True)]
            found[f"{what}, {'train' if mode else 'eval'}"] = [*map(median, taken.values()), median(ratios)]
    return found


def vectors(count: int) -> dict[str, dict[str, float]]:
    """Compilations and time for random vectors of modes."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 2, (count, 6), generator=generator).bool().tolist()
    found = {}
    for name, asked in {"guards": {}, "mode_vectors": {"mode_vectors": 64}, "data": {"modes": "data"}}.items():
        torch._dynamo.reset()
        counters.clear()
        model, x = MLP(64), torch.randn(32, 64)
        call = torch.compile(model, backend="pt2e_modes", options=asked)
        drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
            start = time.perf_counter()
            for vector in chosen:
                for drop, mode in zip(drops, vector, strict=True):
                    drop.train(mode)
                step(call, x)
            found[name] = {"graphs": counters["stats"]["unique_graphs"], "seconds": time.perf_counter() - start}
    return found | {"distinct": {"graphs": len({tuple(v) for v in chosen}), "seconds": 0.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--vectors", type=int, default=64)
    parser.add_argument("--no-vectors", action="store_true")
    arguments = options(parser, "transformers")
    figures: dict[str, Any] = {}
    rows = []
    for name, (make, x) in MODELS.items():
        torch._dynamo.reset()
        figures[name] = calls(make, x, arguments.repeats)
        for what, (guards, data, ratio) in figures[name].items():
            rows.append([name, what, f"{guards * 1e6:,.0f}", f"{data * 1e6:,.0f}", f"{ratio:.3f}"])
    print(markdown(COLUMNS, rows), flush=True)
    if not arguments.no_vectors:
        figures["vectors"] = found = vectors(arguments.vectors)
        distinct = found.pop("distinct")["graphs"]
        rows = [[name, f"{own['graphs']}", f"{own['seconds']:.1f}"] for name, own in found.items()]
        print(f"\n{arguments.vectors} random vectors, {distinct} of them distinct\n")
        print(markdown(["", "graphs compiled", "all calls, s"], rows))
    finish(arguments, figures)


if __name__ == "__main__":
    main()
