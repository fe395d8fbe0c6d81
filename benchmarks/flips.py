"""What a flip between train() and eval() costs, and what it breaks: this project, torchao, two exports, eager.

    python -m benchmarks.flips [--model resnet18] [--flips N] [--threads N] [--json FILE]

Everything runs in one process on the CPU. Every cell is measured; a contender that raises shows the exception's name.
``torch.set_num_threads`` is set from ``--threads``, 1 by default: the calls are short, and one thread is disturbed
least by whatever else the machine does.

The contenders take turns in blocks of flips, not flip by flip: a flip may discard the compiled code of the whole
process (torchao's strict exports call ``torch._dynamo.reset()``), and its neighbours would be charged for that. So each
block starts from a reset of its own, and a bystander, compiled and unrelated, shows what the flips do to others.
"""

import argparse
import copy
import gc
import itertools
import json
import logging
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import compile_modes as cm
from benchmarks.common import short, versions

try:
    from rich.console import Console
    from rich.table import Table
    from torchao.quantization.pt2e import allow_exported_model_train_eval
except ImportError as error:
    raise SystemExit(f'{error}; the benchmarks need: pip install "compile_modes[benchmark]"') from None

MODE_ARGUMENTS = {"train", "training", "use_input_stats"}
PHASES, STEPS, LEARNING_RATE = (True, False, True, False), 3, 0.01
SECOND_ROUND = 6  # flips of each contender's second block; the first has --flips, which also counts the compiles
WARM_UP = 2  # flips at the start of a block left out of the times: they compile the two modes for the first time


class SmallCNN(nn.Module):
    """Literals unlike PyTorch's defaults, so that a flip which falls back to the defaults is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=1e-3, momentum=0.03)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32, eps=1e-3, momentum=0.03)
        self.drop, self.drop2d, self.fc = nn.Dropout(0.1), nn.Dropout2d(0.2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop2d(torch.relu(self.bn1(self.conv1(x))))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return self.fc(self.drop(x))


class Parent(nn.Module):
    """The eager model around an exported one."""

    def __init__(self, child: nn.Module, features: int) -> None:
        super().__init__()
        self.child, self.head = child, nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.child(x)))


@dataclass
class Contender:
    """One way to train and evaluate a compiled model: how to call it, how to flip it, where its state is."""

    call: Callable[[Tensor], Tensor]
    flip: Callable[[bool], Any]
    active: Callable[[], nn.Module]
    graphs: list[fx.GraphModule]


@dataclass
class Result:
    """What was measured of one contender; times in seconds."""

    flips: list[float] = field(default_factory=list)
    first_calls: list[float] = field(default_factory=list)
    next_calls: list[float] = field(default_factory=list)
    compiles: int = 0  # of one block, the worst
    bystander: int = 0
    limit_hit: bool = False
    lost: list[str] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    raised: dict[str, str] = field(default_factory=dict)


Build = Callable[[nn.Module, Tensor], Contender]


def ours(model: nn.Module, x: Tensor) -> Contender:
    module = cm.bind(torch.export.export(model, (x,)))
    return Contender(torch.compile(module, backend="pt2e_modes"), module.train, lambda: module, [module])


def peer(model: nn.Module, x: Tensor) -> Contender:
    module = allow_exported_model_train_eval(torch.export.export(model, (x,)).module())
    return Contender(torch.compile(module), module.train, lambda: module, [module])


def two_exports(model: nn.Module, x: Tensor) -> Contender:
    """A train and an eval program, which share the state of ``model``; a flip picks one."""
    modules = {mode: torch.export.export(model.train(mode), (x,)).module() for mode in (False, True)}
    compiled = {mode: torch.compile(module) for mode, module in modules.items()}
    picked = [True]
    return Contender(
        lambda x: compiled[picked[0]](x),
        lambda mode: picked.__setitem__(0, mode),
        lambda: modules[picked[0]],
        list(modules.values()),
    )


def eager(model: nn.Module, x: Tensor) -> Contender:
    return Contender(torch.compile(model), model.train, lambda: model, [])


def nested(build: Build, backend: str) -> Build:
    """``build``'s module inside an eager parent which is compiled and flipped as a whole."""

    def build_nested(model: nn.Module, x: Tensor) -> Contender:
        child = build(model, x).active()
        parent = parent_of(child, model, x)
        return Contender(torch.compile(parent, backend=backend), parent.train, lambda: parent, [child])

    return build_nested


def parent_of(child: nn.Module, model: nn.Module, x: Tensor) -> Parent:
    with torch.no_grad():
        features = copy.deepcopy(model).eval()(x).shape[1]
    # Dynamo keeps compiled code, and counts towards its recompile limit, per code object. With a forward of its own,
    # one contender's recompiles cannot use up another's limit.
    forward = types.FunctionType(Parent.forward.__code__.replace(), globals())
    torch.manual_seed(1)
    return type("Parent", (Parent,), {"forward": forward})(child, features)


CONTENDERS: dict[str, Build] = {
    "compile_modes": ours,
    "torchao": peer,
    "two exports": two_exports,
    "eager model": eager,
    "compile_modes, nested": nested(ours, "pt2e_modes"),
    "torchao, nested": nested(peer, "inductor"),
}


class LimitWatch(logging.Handler):
    """Sees Dynamo report that it gives up on a function: from there on it runs without compilation."""

    seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += "hit config." in record.getMessage()  # the limit's name is an argument of the record


def attempt(result: Result, stage: str, work: Callable[[], None]) -> None:
    """A contender that raises is a finding, and must not end the run of the others."""
    if stage in result.raised:
        return
    try:
        work()
    except Exception as error:
        result.raised[stage] = type(error).__name__


def time_block(name: str, model: nn.Module, x: Tensor, flips: int, result: Result) -> None:
    """One contender's block of flips, with nothing compiled before."""
    torch._dynamo.reset()
    contender, watch, counts = CONTENDERS[name](copy.deepcopy(model), x), LimitWatch(), [0, 0]
    bystander = torch.compile(lambda x: x + 1, backend="eager")
    bystander(x)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(watch)
    try:
        for number in range(flips):
            times = time_flip(contender, x, bool(number % 2), counts)
            before = counters["stats"]["unique_graphs"]
            bystander(x)
            counts[1] += counters["stats"]["unique_graphs"] - before
            if number >= WARM_UP:
                for kept, seconds in zip((result.flips, result.first_calls, result.next_calls), times, strict=True):
                    kept.append(seconds)
    finally:
        logger.removeHandler(watch)
    result.compiles, result.bystander = max(result.compiles, counts[0]), max(result.bystander, counts[1])
    result.limit_hit |= watch.seen > 0


def time_flip(contender: Contender, x: Tensor, mode: bool, counts: list[int]) -> tuple[float, float, float]:
    gc.collect()  # garbage of what went before is not collected on this flip's clock
    start = time.perf_counter()
    contender.flip(mode)
    flipped = time.perf_counter()
    # Counted around the calls only: torchao's flip runs exports, which use Dynamo as well.
    before = counters["stats"]["unique_graphs"]
    called = time.perf_counter()
    contender.call(x)
    first = time.perf_counter()
    contender.call(x)
    second = time.perf_counter()
    counts[0] += counters["stats"]["unique_graphs"] - before
    return flipped - start, first - called, second - first


def literals(graphs: list[fx.GraphModule]) -> dict[str, Any]:
    """Every literal argument but the modes, by occurrence of its op and by name in the op's schema."""
    found: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        op = node.target._schema.name.removeprefix("aten::")
        seen[op] = seen.get(op, -1) + 1
        for index, argument in enumerate(node.target._schema.arguments):
            default = node.kwargs.get(argument.name, argument.default_value)
            value = node.args[index] if index < len(node.args) else default
            if argument.name not in MODE_ARGUMENTS and not isinstance(value, fx.Node):
                found[f"{op}[{seen[op]}].{argument.name}"] = value
    return found


def round_trip(build: Build, model: nn.Module, x: Tensor, result: Result) -> None:
    """Which literals are not what they were after train -> eval -> train."""
    contender = build(copy.deepcopy(model), x)
    if contender.graphs:
        before = literals(contender.graphs)
        contender.flip(False)
        contender.flip(True)
        after = literals(contender.graphs)
        keys = list(dict.fromkeys([*before, *after]))
        pairs = [(key, before.get(key, "absent"), after.get(key, "absent")) for key in keys]
        result.lost = [f"{key}: {old} -> {new}" for key, old, new in pairs if str(old) != str(new)]


def compare(name: str, model: nn.Module, x: Tensor, result: Result) -> None:
    """Trains and evaluates beside eager, with the same seeds, and keeps the largest difference of each kind."""
    torch._dynamo.reset()  # no code compiled without fallback_random may be found again
    contender = CONTENDERS[name](copy.deepcopy(model), x)
    reference = copy.deepcopy(model)
    if name.endswith("nested"):
        reference = parent_of(reference, model, x)
    for number, mode in enumerate(PHASES):
        if number:  # all start in train, as built
            contender.flip(mode)
        reference.train(mode)
        for step in range(STEPS):
            seed = torch.manual_seed(100 + STEPS * number + step).initial_seed()
            batch = torch.randn_like(x)
            expected = train_step(reference, reference, batch, seed)
            got = train_step(contender.call, contender.active(), batch, seed)
            for key in expected:
                kind = "num_batches_tracked" if key.endswith("num_batches_tracked") else key.split()[0]
                error = (got[key].double() - expected[key].double()).abs().max().item()
                result.errors[kind] = max(result.errors.get(kind, 0.0), error)
                if kind == "num_batches_tracked":
                    result.counters[key.split()[1]] = (int(got[key]), int(expected[key]))


def train_step(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """One step of SGD, in either mode: eval is where a wrong batch norm shows in the gradients."""
    module.zero_grad()
    torch.manual_seed(seed)
    output = call(x)
    output.square().mean().backward()
    tensors = {"outputs": output.detach().clone()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            tensors[f"gradients {name}"] = gradient.clone()
            parameter.sub_(gradient, alpha=LEARNING_RATE)
    tensors.update({f"buffers {name}": buffer.clone() for name, buffer in module.named_buffers()})
    return tensors


def timing(times: list[float], own: list[float]) -> str:
    """A median, and how many times ours it is."""
    cell = f"{short(1e3 * median(times))} ms"
    return cell if times is own or not own else f"{cell} (x{short(median(times) / median(own))})"


def row(result: Result, base: Result) -> list[str]:
    """The cells of one contender; ``base`` is ours in the same position, at top level or nested."""
    if "time" in result.raised:
        cells = [result.raised["time"]] * 6
    else:
        names = ("flips", "first_calls", "next_calls")
        cells = [timing(getattr(result, name), getattr(base, name)) for name in names]
        cells.insert(2, f"{short(1e3 * max(result.first_calls))} ms")
        cells += [f"{result.compiles}" + (", then eager" if result.limit_hit else ""), str(result.bystander)]
    cells.append(result.raised.get("literals") or ("-" if result.lost is None else str(len(result.lost))))
    if "error" in result.raised:
        return [*cells, result.raised["error"], "-"]
    worst = max(result.errors, key=result.errors.__getitem__)
    wrong = {f"no: {got}, eager {want}" for got, want in result.counters.values() if got != want}
    return [*cells, f"{result.errors[worst]:.2g} ({worst})", ", ".join(sorted(wrong)) or "yes"]


def report(console: Console, results: dict[str, Result], flips: int) -> None:
    columns = ["", "flip", "first call after it", "its worst", "next call", f"compiles, {flips} flips"]
    columns += ["bystander's", "literals lost", "largest error", "counters right"]
    table = Table(*columns)
    for name, result in results.items():
        base = results["compile_modes, nested" if name.endswith("nested") else "compile_modes"]
        table.add_row(name, *row(result, base))
    console.print(table)
    for name, result in results.items():
        errors = ", ".join(f"{kind} {error:.2g}" for kind, error in result.errors.items())
        console.print(f"{name}: errors: {errors or 'none measured'}", highlight=False)
        for line in result.lost or ():
            console.print(f"    lost: {line}", highlight=False, markup=False)
    console.print("(xN): times that of compile_modes in the same position, top level or nested", highlight=False)


def make_model(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "small":
        return SmallCNN(), torch.randn(8, 3, 16, 16)
    try:
        from torchvision.models import resnet18
    except ImportError as error:
        raise SystemExit(f"{error}; --model resnet18 needs: pip install torchvision") from None
    return resnet18(num_classes=10), torch.randn(4, 3, 64, 64)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=["small", "resnet18"], default="small")
    parser.add_argument("--flips", type=int, default=20, help="timed flips of each contender (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    if args.flips <= WARM_UP:
        parser.error(f"--flips must be more than {WARM_UP}, the flips that compile the two modes")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, x = make_model(args.model)
    head = versions("torchao") | {"device": "CPU", "threads": str(args.threads), "model": args.model}
    # Wide enough for the table also where the output is no terminal.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    results = {name: Result() for name in CONTENDERS}
    console.print(", ".join(f"{key} {value}" for key, value in head.items()), highlight=False)
    # Inductor's own random numbers differ from eager's by design; with eager's, the results can be compared. Set for
    # the timing as well, so that what is checked is what was timed.
    with console.status("measuring"), torch._inductor.config.patch(fallback_random=True):
        for flips, (name, result) in itertools.product((args.flips, SECOND_ROUND), results.items()):
            attempt(result, "time", partial(time_block, name, model, x, flips, result))
        for name, result in results.items():
            attempt(result, "literals", partial(round_trip, CONTENDERS[name], model, x, result))
            attempt(result, "error", partial(compare, name, model, x, result))
    report(console, results, args.flips)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**head, "results": {n: asdict(r) for n, r in results.items()}}, file, indent=1)


if __name__ == "__main__":
    main()
