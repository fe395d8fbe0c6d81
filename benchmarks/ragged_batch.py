"""What the last, smaller batch of each epoch costs: one code for all sizes, a code for each size, or padding.

    python -m benchmarks.ragged_batch [--models cnn bert] [--sizes 32 20] [--steps N] [--json FILE]

Two epochs of training and validation over a batch of 32 and a last one of 20, compiled by the backend, in one thread:

- "dynamic": compiled for any batch size of at least two, as the trainers' callbacks ask for;
- "static": compiled for the first size, and again, in each mode, for the other (``dynamic=False``);
- "padded": compiled for the first size; the last batch is filled up with copies of its first row, and the loss and the
  outputs are those of its own rows.

"compiling" is the time of all calls that compiled. Then medians of ``--steps`` steps of each kind. Times are CPU time,
for "compiling" that of compilers too, so that other work on the machine counts little. "loss" is how far the loss of a
training step on the last batch is from eager's, relative: a batch norm sees the padding.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import finish, markdown, options, short
from benchmarks.sampling import bert
from benchmarks.train_step import build

CONTENDERS = ("dynamic", "static", "padded")
Call = Callable[[Tensor], Tensor]


def now() -> float:
    """CPU seconds of this process and of those that it has waited for, to a hundredth."""
    return sum(os.times()[:4])


class Logits(nn.Module):
    """BERT-1, of width 128, of whose results only the logits count."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = bert()
        self.model.bert.encoder.layer = self.model.bert.encoder.layer[:1]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def made(name: str, full: int) -> tuple[nn.Module, Tensor]:
    """A model, and a batch; no dropout, so that losses can be compared."""
    torch.manual_seed(0)
    if name == "bert":
        model, x = Logits(), torch.randint(0, 1000, (full, 32))
    else:
        model, x = build(name)[0], torch.randn(full, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()(x)  # lazy parameters
    return model, x


def calls(model: nn.Module, contender: str, full: int) -> Call:
    """How a contender calls a compiled copy of a model."""
    model.compile(backend="pt2e_modes", dynamic=None if contender == "dynamic" else False)

    def call(x: Tensor) -> Tensor:
        if contender == "dynamic":
            torch._dynamo.maybe_mark_dynamic(x, 0)
        if contender != "padded" or len(x) == full:
            return model(x)
        return model(torch.cat([x, x[:1].expand(full - len(x), *x.shape[1:])]))[: len(x)]

    return call


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.float().square().mean()


def step(model: nn.Module, call: Call, x: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    """One step in train, with an optimizer, or in eval; returns its loss."""
    model.train(optimizer is not None)
    with torch.set_grad_enabled(optimizer is not None):
        loss = loss_of(call(x))
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def measure(name: str, full: int, last: int, steps: int) -> dict[str, dict[str, float]]:
    model, x = made(name, full)
    eager = loss_of(copy.deepcopy(model).train()(x[:last])).item()
    found: dict[str, dict[str, float]] = {}
    for contender in CONTENDERS:
        torch._dynamo.reset()
        own, batches = copy.deepcopy(model), {"full": x.clone(), "last": x[:last].clone()}  # marks stay on tensors
        call, optimizer = calls(own, contender, full), torch.optim.SGD(own.parameters(), lr=1e-6)
        graphs = torch._dynamo.utils.counters["stats"]
        first = graphs["unique_graphs"]
        figures = found[contender] = {"compiling": 0.0}
        for _ in range(2):  # epochs
            for trained in (optimizer, None):
                for batch in batches.values():
                    before, start = graphs["unique_graphs"], now()
                    step(own, call, batch, trained)
                    if graphs["unique_graphs"] > before:
                        figures["compiling"] += now() - start
        figures["graphs"] = graphs["unique_graphs"] - first
        own.load_state_dict(model.state_dict())
        figures["loss"] = abs(step(own, call, batches["last"], optimizer) - eager) / eager
        for mode, trained in (("train", optimizer), ("eval", None)):
            for size, batch in batches.items():
                times = []
                for _ in range(steps):
                    start = time.process_time()
                    step(own, call, batch, trained)
                    times.append(time.process_time() - start)
                figures[f"{mode}, {size}"] = median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "bert"], choices=["cnn", "bert"])
    parser.add_argument("--sizes", nargs=2, type=int, default=[32, 20], help="of a full batch, and of the last")
    parser.add_argument("--steps", type=int, default=30)
    arguments = options(parser, "transformers")
    figures = {name: measure(name, *arguments.sizes, arguments.steps) for name in arguments.models}
    kinds = [f"{mode}, {size}" for mode in ("train", "eval") for size in ("full", "last")]
    rows: list[Any] = []
    for name, contenders in figures.items():
        for contender, own in contenders.items():
            cells = [f"{own['graphs']:.0f}", f"{own['compiling']:.0f} s", *(f"{short(own[k] * 1e3)} ms" for k in kinds)]
            rows.append([name, contender, *cells, f"{own['loss']:.1e}"])
    print(markdown(["model", "", "graphs", "compiling", *kinds, "loss"], rows))
    finish(arguments, figures)


if __name__ == "__main__":
    main()
