"""Random modules that write state in one mode only, or in both, and draw noise: what Python decides by ``training``."""

import contextlib
import random

import torch
from torch import nn

WIDTH = 4
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(5))
WRITES = ("mul_", "copy_", "lerp_", "assign", "index", "mask", "counter", "queue", "twin", "noise", "none")
SURROUNDINGS = ("plain", "no_grad", "autocast", "enable_grad", "decorated", "nested")
READS = ("before", "after", "never")
WHEN = ("train", "eval", "both")


class Writer(nn.Module):
    """Writes one piece of state, in one way, under one kind of surroundings."""

    def __init__(self, write: str, surroundings: str, read: str, when: str) -> None:
        super().__init__()
        self.write, self.surroundings, self.read, self.when = write, surroundings, read, when
        self.register_buffer("book", torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("queue", torch.zeros(3, WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.fc = nn.Linear(WIDTH, WIDTH)
        if write == "twin":
            self.twin = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def update(self, h: torch.Tensor) -> None:
        mean = h.detach().mean(0)
        if self.write == "mul_":
            self.book.mul_(0.9)
        elif self.write == "copy_":
            self.book.copy_(mean)
        elif self.write == "lerp_":
            self.book.lerp_(mean, 0.1)
        elif self.write == "assign":
            self.book = self.book * 0.9 + mean * 0.1
        elif self.write == "index":
            self.book[:2] = mean[:2]
        elif self.write == "mask":
            self.book.masked_fill_(mean > 0.2, 0.7)
        elif self.write == "counter":
            self.steps += 1
            self.book.add_(0.01 * self.steps)
        elif self.write == "queue":
            self.queue.copy_(torch.cat([self.queue[1:], mean[None]]))
            self.book.copy_(self.queue.mean(0))
        elif self.write == "twin":
            for ours, theirs in zip(self.twin.parameters(), self.fc.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs.detach(), alpha=0.1)

    @torch.no_grad()
    def decorated(self, h: torch.Tensor) -> None:
        self.update(h)

    def surrounded(self, h: torch.Tensor) -> None:
        if self.surroundings == "decorated":
            return self.decorated(h)
        with contextlib.ExitStack() as stack:
            if self.surroundings in ("no_grad", "enable_grad", "nested"):
                stack.enter_context(torch.no_grad())
            if self.surroundings == "enable_grad":
                stack.enter_context(torch.enable_grad())
            if self.surroundings in ("autocast", "nested"):
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            return self.update(h)

    def value(self, h: torch.Tensor) -> torch.Tensor:
        return self.twin(h) if self.write == "twin" else h * self.book.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        if self.read == "before":
            h = self.value(h)
        if self.when == "both" or (self.when == "train") == self.training:
            if self.write == "noise":
                h = h + 0.1 * torch.randn_like(h)
            else:
                self.surrounded(h)
        return self.value(h) if self.read == "after" else h


class Caller(nn.Module):
    """Calls a method of its child in one mode: its own flag decides, in the midst of the child's state."""

    def __init__(self, child: Writer) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.child(x)
        if self.training:
            self.child.surrounded(y)
        return y


class Skip(nn.Module):
    """Runs its child in one mode only."""

    def __init__(self, *children: nn.Module, when: bool = True) -> None:
        super().__init__()
        self.when, self.child = when, nn.Sequential(*children)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.child(x).tanh() if self.training is self.when else x


def build(seed: int) -> nn.Module:
    """One model, the same for a seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def writer() -> Writer:
        return Writer(*(rng.choice(kinds) for kinds in (WRITES, SURROUNDINGS, READS, WHEN)))

    def part(depth: int) -> nn.Module:
        kind = rng.random()
        if kind < 0.6 or depth > 1:
            return writer()
        if kind < 0.7:
            return Caller(writer())
        if kind < 0.8:
            return Skip(part(depth + 1), nn.Dropout(0.2), when=kind < 0.75)
        if kind < 0.9:
            return nn.Sequential(part(depth + 1), part(depth + 1))
        return nn.Sequential(nn.BatchNorm1d(WIDTH, momentum=0.2), nn.Dropout(0.3))

    return nn.Sequential(*(part(0) for _ in range(rng.choice((1, 2, 3)))), nn.Linear(WIDTH, 3))
