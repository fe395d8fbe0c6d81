"""One contender on one model, in a process of its own: what benchmarks/gpu.py starts, asks, and may kill.

A process each, because contenders disturb each other otherwise (torchao's flips reset Dynamo, freezing is a global
switch), and because a contender that crashes or takes too long must not end the run.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from compile_modes.backend.entry import pt2e_modes

CHANNELS_LAST = {"resnet50", "efficientnet_b0", "convnext_tiny", "tiny"}
BATCH = {"resnet50": 64, "efficientnet_b0": 64, "convnext_tiny": 64, "vit_b_16": 64, "bert_base": 32, "tiny": 4}
TOKENS = 128


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    model: str
    dtype: str
    contender: str
    device: str


def tiny() -> nn.Module:
    """For the smoke run."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(10))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights and one batch, on the CPU."""
    torch.manual_seed(0)
    if name == "bert_base":
        from transformers import BertConfig, BertModel

        config = BertConfig(return_dict=False)
        return BertModel(config), torch.randint(0, config.vocab_size, (BATCH[name], TOKENS))
    if name == "tiny":
        model, x = tiny(), torch.randn(BATCH[name], 3, 16, 16)
        model(x)  # gives the last layer its size
        return model, x
    from torchvision.models import get_model

    return get_model(name, weights=None), torch.randn(BATCH[name], 3, 224, 224)


def ours(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    return model, torch.compile(model, backend=pt2e_modes)


def bound(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    import compile_modes as cm

    module = cm.bind(torch.export.export(model, (x,)))
    return module, torch.compile(module, backend="pt2e_modes")


def stock(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    return model, torch.compile(model)


def freezing(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    """Eval only: constants are folded once, and go stale with the next change of a weight."""
    torch._inductor.config.freezing = True
    return model.eval(), torch.compile(model)


def eager(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    return model, model


def torchao(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    from torchao.quantization.pt2e import allow_exported_model_train_eval

    module = allow_exported_model_train_eval(torch.export.export(model, (x,)).module())
    return module, torch.compile(module)


CONTENDERS = {f.__name__: f for f in (ours, stock, eager, freezing, torchao, bound)}


class Run:
    """A contender at work."""

    def __init__(self, task: Task) -> None:
        self.task, self.cuda = task, task.device == "cuda"
        if not self.cuda:
            torch.set_num_threads(1)  # all contenders' processes share the cores
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        model, x = make(task.model)
        layout = {"memory_format": torch.channels_last} if task.model in CHANNELS_LAST else {}
        self.x = x.to(task.device, **layout)
        self.original = model.train().to(task.device, **layout)
        self.module, self.call = CONTENDERS[task.contender](self.original, self.x)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-4, momentum=0.9)

    def forward(self, call: Callable[..., Any]) -> Tensor:
        with torch.autocast(self.task.device, torch.bfloat16, enabled=self.task.dtype == "bfloat16"):
            output = call(self.x)
        return output[0] if isinstance(output, tuple) else output

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.forward(self.call).float().square().mean().backward()
        self.optimizer.step()

    def eval(self) -> Tensor:
        with torch.no_grad():
            return self.forward(self.call)

    def step(self, mode: str) -> None:
        if mode == "train":
            self.train()
        else:
            self.eval()

    def flip(self, mode: str) -> None:
        self.module.train(mode == "train")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def modes(self) -> list[str]:
        return ["eval"] if self.task.contender == "freezing" else ["train", "eval"]

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds until the device is done, on the host's clock."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def compile(self) -> dict[str, Any]:
        """The first call of each mode, a few more of it, and how far eval is from eager."""
        seconds = {}
        for mode in self.modes():
            self.flip(mode)
            seconds[mode] = self.timed(lambda mode=mode: self.step(mode))
            for _ in range(3):  # compiled code tunes itself in its first calls, and cudnn picks its kernels
                self.step(mode)
        self.flip("eval")
        found = self.eval().float()
        self.original.eval()
        with torch.no_grad():
            expected = self.forward(self.original).float()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if self.cuda:
            torch.cuda.empty_cache()
        return {"first_call_s": seconds, "eval_error": error}

    def samples(self, mode: str, seconds: float) -> list[float]:
        """Times of single steps in ms, by CUDA events where there are any."""
        self.flip(mode)
        self.step(mode)
        count = max(3, min(200, int(seconds / max(1e-6, self.timed(lambda: self.step(mode))))))
        if not self.cuda:
            return [1e3 * self.timed(lambda: self.step(mode)) for _ in range(count)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step(mode)
            mark.record()
        self.wait()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def flips(self, count: int, seconds: float) -> dict[str, Any]:
        """Times in ms of a flip, and of the first step after it, by the mode flipped to; and what was compiled."""
        from torch._dynamo.utils import counters

        compiled, end = counters["stats"]["unique_graphs"], time.perf_counter() + seconds
        flips: list[float] = []
        first: dict[str, list[float]] = {"train": [], "eval": []}
        self.flip("eval")
        self.step("eval")
        while len(flips) < 2 or (len(flips) < count and time.perf_counter() < end):
            mode = "eval" if len(flips) % 2 else "train"
            flips.append(1e3 * self.timed(lambda mode=mode: self.flip(mode)))
            first[mode].append(1e3 * self.timed(lambda mode=mode: self.step(mode)))
        compiled = counters["stats"]["unique_graphs"] - compiled
        return {"flips_ms": flips, "after_flip_ms": first, "compiles_per_flip": compiled / len(flips)}


def commands(run: Run, connection: Connection) -> Iterator[Any]:
    """Answers to what the parent asks, until it asks no more."""
    while (order := connection.recv()) is not None:
        name, *arguments = order
        yield getattr(run, name)(*arguments)


def main(connection: Connection, task: Task, cache: str, threads: int) -> None:
    """The process: builds, then answers (True, result), or (False, reason) once and ends.

    Args:
        connection: to the parent.
        task: what to measure.
        cache: directory for what is compiled; ``""`` for the user's own.
        threads: how many kernels to build at a time.
    """
    if cache:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=os.path.join(cache, "triton"))
    torch._inductor.config.compile_threads = threads
    try:
        for answer in commands(Run(task), connection):
            connection.send((True, answer))
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]))
