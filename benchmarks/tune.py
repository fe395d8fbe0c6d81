"""What folding eval-mode batch norms saves in training with frozen statistics, and what it costs.

    python -m benchmarks.tune [--models resnet18 resnet50 ...] [--repeats N] [--contiguous] [--json FILE] [--plot FILE]

All parameters train, batch norms are in eval. Contenders: stock ``torch.compile``; ours, without and with the option
``tune``; stock with Inductor's own ``efficient_conv_bn_eval_fx_passes``. All are compiled in one process, then take
turns, step by step, in one thread. "saved" is what the forward pass leaves for the backward pass besides parameters and
buffers; "peak" the most that a step has allocated beyond what was there before it; times are medians of a step
(forward, backward) in CPU time, and ratios those to stock in the same turn. Models are in channels_last, or else
Inductor keeps a copy in that layout of every convolution's weight, whatever the contender: ``--contiguous`` shows it.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import MIB, bars, finish, markdown, options, peak

MODELS = ("resnet18", "resnet50", "regnet_x_400mf", "mobilenet_v2", "efficientnet_b0")
CONTENDERS = ("stock", "ours", "tune", "Inductor's pass")
COLUMNS = ("saved, MiB", "of stock", "peak, MiB", "of stock", "step, ms", "of stock", "error of gradients")


def build(name: str) -> nn.Module:
    """A model with random weights and statistics, whose batch norms are in eval."""
    torchvision = __import__("torchvision")
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            for tensor, low, high in (
                (module.running_var, 0.5, 1.5), (module.running_mean, -0.1, 0.1), (module.weight.data, 0.5, 1.5)
            ):  # fmt: skip
                tensor.uniform_(low, high)
        elif isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.eval()  # so that gradients can be compared
    return model


def compiled(contender: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    if contender in ("ours", "tune"):
        return torch.compile(model, backend="pt2e_modes", options={"tune": contender == "tune"})
    if contender == "Inductor's pass":  # by an option, or Dynamo would take stock's code
        return torch.compile(model, options={"efficient_conv_bn_eval_fx_passes": True})
    return torch.compile(model)


def step(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    call(x).square().mean().backward()


def saved(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """The bytes of the storages that the autograd graph of an output holds, without the model's and the input's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    held: dict[int, int] = {}
    output = call(x)
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        # From torch 2.14, AOTAutograd keeps what no one can have written to apart from the rest.
        values = [*getattr(node, "saved_tensors", ()), *getattr(node, "_tensors_no_vc_check", ())]
        for storage in (t.untyped_storage() for t in values if isinstance(t, Tensor)):
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def prepared(model: nn.Module, x: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]:
    calls = {}
    for contender in CONTENDERS:
        own = copy.deepcopy(model)
        call = compiled(contender, own)
        step(call, x)
        own.zero_grad()
        calls[contender] = call, own
    return calls


def error(model: nn.Module, reference: nn.Module) -> float:
    """The norm of the difference of all gradients, relative to that of eager's; where ReLUs flip, it is not tiny."""
    ours, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, reference))
    return float((ours - expected).norm() / expected.norm())


def measured(name: str, repeats: int, x: Tensor, layout: torch.memory_format) -> dict[str, dict[str, float]]:
    eager = build(name).to(memory_format=layout)  # type: ignore[call-overload]
    x = x.to(memory_format=layout)
    calls = prepared(eager, x)
    step(eager, x)
    times: dict[str, list[float]] = {contender: [] for contender in calls}
    found: dict[str, dict[str, float]] = {}
    for contender, (call, model) in calls.items():
        step(call, x)
        found[contender] = {
            "error": error(model, eager),
            "saved": saved(call, model, x),
            "peak": peak(functools.partial(step, call, x)),
        }
    for turn in range(repeats):
        for contender in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            step(calls[contender][0], x)
            times[contender].append(time.process_time() - start)
    for contender, own in times.items():
        ratios = [a / b for a, b in zip(own, times["stock"], strict=True)]
        found[contender] |= {"step": median(own), "ratio": median(ratios)}
    return found


def row(name: str, contender: str, found: dict[str, dict[str, float]]) -> list[str]:
    own, stock = found[contender], found["stock"]
    figures = [f"{own['saved'] / MIB:.1f}", f"{own['saved'] / stock['saved']:.2f}"]
    figures += [f"{own['peak'] / MIB:.1f}", f"{own['peak'] / stock['peak']:.2f}"]
    return [name, contender, *figures, f"{own['step'] * 1e3:.0f}", f"{own['ratio']:.3f}", f"{own['error']:.0e}"]


def draw(axes: Any, figures: dict[str, Any]) -> None:
    """What ``tune`` saves for the backward pass, has allocated at most, and takes, of stock's."""
    shown = {
        "saved": [f["tune"]["saved"] / f["stock"]["saved"] for f in figures.values()],
        "peak": [f["tune"]["peak"] / f["stock"]["peak"] for f in figures.values()],
        "time": [f["tune"]["ratio"] for f in figures.values()],
    }
    bars(axes, list(figures), shown, "of stock torch.compile's, with tune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--contiguous", action="store_true")
    arguments = options(parser, "torchvision", plots=True)
    layout = torch.contiguous_format if arguments.contiguous else torch.channels_last
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    figures: dict[str, Any] = {}
    rows = []
    for name in arguments.models:
        torch._dynamo.reset()
        figures[name] = measured(name, arguments.repeats, x, layout)
        rows += [row(name, contender, figures[name]) for contender in CONTENDERS]
        print(markdown(["model", "", *COLUMNS], rows[-len(CONTENDERS) :]), flush=True)
    finish(arguments, figures, lambda ax: draw(ax, figures))


if __name__ == "__main__":
    main()
