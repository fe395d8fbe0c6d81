"""How much of a compilation is ours: of Dynamo and AOTAutograd with a compiler that does nothing behind them.

    python -m benchmarks.compile_share [--models resnet50 bert] [--repeats N] [--json FILE] [--plot FILE]

That is what a warm start pays, where Inductor's caches have the rest. "follows the flags" is the backend without
options, which captures a graph only where a form has work in it; "forced" has a model that trains put into eval by
``training``, for which every graph is captured and rewritten. CPU time, medians; a share is our time over what is left
without it.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from benchmarks.common import bars, finish, markdown, options
from compile_modes import _compat
from compile_modes.backend.entry import pt2e_modes

COLUMNS = ("whole, s", "ours, s", "share")


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name == "bert":
        transformers = __import__("transformers")
        size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
        config = transformers.BertConfig(num_hidden_layers=12, **size)
        return transformers.BertModel(config), torch.randint(0, 100, (2, 16))
    return __import__("torchvision").models.get_model(name), torch.randn(2, 3, 64, 64)


class Stage:
    """The backend, with a clock for what it does itself, and nothing behind AOTAutograd."""

    def __init__(self) -> None:
        self.within = self.behind = 0.0
        self._rest = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward))
        _compat.inductor = lambda mode, options: self.rest  # type: ignore[assignment]

    def rest(self, gm: Any, example_inputs: Any) -> Any:
        start = time.process_time()
        try:
            return self._rest(gm, example_inputs)
        finally:
            self.behind += time.process_time() - start

    def __call__(self, gm: Any, example_inputs: Any, **options: Any) -> Callable[..., Any]:
        start = time.process_time()
        try:
            return pt2e_modes(gm, example_inputs, **options)
        finally:
            self.within += time.process_time() - start


def compiled_once(model: nn.Module, x: Tensor, training: bool, forced: bool) -> dict[str, float]:
    torch._dynamo.reset()
    stage, model = Stage(), model.train(training is not forced)
    start = time.process_time()
    torch.compile(model, backend=stage, options={"training": training} if forced else None)(x)
    whole, ours = time.process_time() - start, stage.within - stage.behind
    return {"whole, s": whole, "ours, s": ours, "share": ours / (whole - ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "bert"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = options(parser, "torchvision", "transformers", plots=True)
    figures: dict[str, dict[str, float]] = {}
    for name in arguments.models:
        model, x = build(name)
        for forced in (False, True):
            for training in (False,) if forced else (True, False):
                runs = [compiled_once(model, x, training, forced) for _ in range(arguments.repeats + 1)][1:]
                label = f"{name}, {'train' if training else 'eval'}, {'forced' if forced else 'follows the flags'}"
                figures[label] = {column: median(run[column] for run in runs) for column in COLUMNS}
    rows = [[n, f"{f['whole, s']:.2f}", f"{f['ours, s']:.3f}", f"{f['share']:.1%}"] for n, f in figures.items()]
    print(markdown(["", *COLUMNS], rows))
    shares = {"share, %": [f["share"] * 100 for f in figures.values()]}
    finish(arguments, figures, lambda ax: bars(ax, list(figures), shares, "of Dynamo and AOTAutograd, %"))


if __name__ == "__main__":
    main()
