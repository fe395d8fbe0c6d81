"""Eval under each contender: models, and how they are compiled, for eval_speed.py and refresh.py."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import nn
from torch._inductor import config as inductor_config

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "vit_b_16")
SETTLES = 6  # calls after which every contender runs what it will run


def build(name: str, size: int) -> nn.Module:
    """A model with random weights, and statistics of batch norm that fit them."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        for _ in range(10):
            model.train()(torch.randn(4, 3, size, size))
        for weight in (p for p in model.parameters() if p.ndim > 1 and not p.any()):  # the head of vit_b_16
            nn.init.trunc_normal_(weight, std=0.02)
    return model.eval()


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    """Inductor's own, as users switch it on. The option alone does nothing; without it, Dynamo takes stock's code."""
    with inductor_config.patch(freezing=True):
        yield


def contenders(model: nn.Module) -> dict[str, tuple[Callable[..., Any], nn.Module]]:
    """What is called, by name, and the model that it is compiled of: each has one of its own."""
    found: dict[str, tuple[Callable[..., Any], nn.Module]] = {}
    for name in ("eager", "stock", "freezing", "auto", "strict"):
        own = copy.deepcopy(model)
        if name == "eager":
            found[name] = own, own
        elif name in ("stock", "freezing"):
            found[name] = torch.compile(own, options={"freezing": True} if name == "freezing" else None), own
        else:
            found[name] = torch.compile(own, backend="pt2e_modes", options={"freeze": name}), own
    return found


def settle(name: str, call: Callable[..., Any], x: torch.Tensor) -> float:
    """Calls until nothing is left to compile; returns how long that took, in seconds."""
    start = time.perf_counter()
    with freezing() if name == "freezing" else contextlib.nullcontext():
        for _ in range(SETTLES):
            call(x)
    return time.perf_counter() - start


def timed(call: Callable[..., Any], *args: Any) -> float:
    """Milliseconds of the CPU, which other programs disturb less than those of the clock; one thread does it all."""
    start = time.process_time()
    call(*args)
    return (time.process_time() - start) * 1e3
