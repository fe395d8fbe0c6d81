"""The main job on real data: an exported CNN trained, evaluated and partly frozen in one compiled module."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from compile_modes._compat.frames import graphs_compiled
from compile_modes.exported.binding import bind

BATCH = 64
TOLERANCE = 1e-4
COMPARED = ("training losses", "test outputs", "parameters", "running statistics", "num_batches_tracked")
# What a run leaves behind: named tensors, by what they are of COMPARED.
Trace = Mapping[str, Mapping[str, Tensor]]


class Block(nn.Module):
    """Convolution, batch norm, SiLU and 2d dropout, with settings that differ from PyTorch's defaults.

    Smooth on purpose. Behind ReLU and max pooling, a rounding error at a kink switches a gradient on or off: two eager
    runs whose weights start 1e-6 apart, relatively, put out logits 0.3 apart after three epochs, and a comparison with
    a twin would say nothing. With SiLU and average pooling, they are 1e-5 apart after eight.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3, momentum=0.05)
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(F.silu(self.bn(self.conv(x))))
        return out


class Digits(nn.Module):
    """A small CNN for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = Block(1, 16)
        self.block2 = Block(16, 32)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.block2(self.block1(x)), 2)
        out: Tensor = self.head(self.drop(x.flatten(1)))
        return out


@dataclass(frozen=True)
class Data:
    """Training and test images (N, 1, 8, 8) in [0, 1], with their labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> "Data":
        """scikit-learn's bundled digits; the split is always the same."""
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
        images, test_images = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
        labels, test_labels = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
        return cls(images, labels, test_images, test_labels)

    @property
    def steps(self) -> int:
        """Batches in one epoch, the incomplete last one included."""
        return math.ceil(len(self.images) / BATCH)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training set once, in the order that ``seed`` decides."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        for index in order.split(BATCH):
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class Epoch:
    """One row of the report; ``seconds`` are those of the compiled model, compilation included."""

    number: int
    frozen: bool
    loss: float
    accuracy: float
    seconds: float
    graphs: int


@dataclass(frozen=True)
class Result:
    """What a run did, and how far it ended from its eager twin.

    Attributes:
        epochs: what happened in each.
        differences: largest absolute difference from the twin, for each of COMPARED.
        mode_vectors: combinations of modes that were used.
        graphs: how many graphs were compiled for them.
        batches_tracked: ``num_batches_tracked`` of each batch norm at the end.
    """

    epochs: list[Epoch]
    differences: dict[str, float]
    mode_vectors: int
    graphs: int
    batches_tracked: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether the twin agrees (NaN does not), and each combination of modes was compiled exactly once."""
        agrees = all(self.differences.get(what, math.inf) <= TOLERANCE for what in COMPARED)
        return agrees and self.graphs == self.mode_vectors


class _Run:
    """A model with its optimizer, and what it has put out so far: the compiled module, or its eager twin."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        self.losses: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.vectors: set[tuple[bool, ...]] = set()

    def train(self, data: Data, seed: int, frozen: bool, after_step: Callable[[], object]) -> float:
        """Trains for one epoch; returns the mean loss."""
        self.model.train()
        if frozen:
            self.model.block2.bn.eval()  # type: ignore[union-attr]
        self._note_modes()
        losses = []
        for step, (images, labels) in enumerate(data.batches(seed)):
            torch.manual_seed(seed + step)  # model and twin drop the same activations
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            after_step()
        self.losses[f"epoch {len(self.losses) + 1}"] = torch.stack(losses)
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def evaluate(self, data: Data) -> float:
        """Accuracy on the whole test set."""
        self.model.eval()
        self._note_modes()
        # Indexed, not split: Dynamo guards on the sizes of what a view is a view of, and would compile eval twice.
        batches = torch.arange(len(data.test_images)).split(BATCH)
        outputs = torch.cat([self.model(data.test_images[index]) for index in batches])
        self.outputs[f"epoch {len(self.outputs) + 1}"] = outputs
        return float((outputs.argmax(1) == data.test_labels).float().mean())

    def trace(self) -> Trace:
        """What :func:`differences` compares."""
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in self.model.state_dict().items()}
        running = {name: state.pop(name) for name in list(state) if ".running_" in name}
        counts = {name: state.pop(name) for name in list(state) if name.endswith("num_batches_tracked")}
        return dict(zip(COMPARED, (self.losses, self.outputs, state, running, counts), strict=True))

    def _note_modes(self) -> None:
        self.vectors.add(tuple(module.training for module in self.model.modules()))


def train(data: Data, epochs: int = 8, seed: int = 0, after_step: Callable[[], object] = lambda: None) -> Result:
    """Trains the exported, bound and compiled model beside its eager twin, and compares the two.

    In the second half of the epochs, batch norm ``block2.bn`` stays in eval while the rest trains.

    Args:
        data: what to train and evaluate on.
        epochs: how many; each ends with an evaluation.
        seed: of the initial weights, the order of the data, and dropout.
        after_step: called after each training step of either.
    """
    rows: list[Epoch] = []
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
        torch.manual_seed(seed)
        twin = _Run(Digits())
        bound = _export(deepcopy(twin.model), data)  # a copy, for export shares the parameters
        # fallback_random: Inductor draws the numbers that eager draws.
        options: dict[str, str | int | bool] = {"fallback_random": True}
        ours = _Run(torch.compile(bound, backend="pt2e_modes", dynamic=True, options=options))  # type: ignore[arg-type]
        before = graphs_compiled()
        for number in range(1, epochs + 1):
            frozen, epoch_seed = freezes(number, epochs), 1000 * (seed * epochs + number)
            start = time.perf_counter()
            loss, accuracy = ours.train(data, epoch_seed, frozen, after_step), ours.evaluate(data)
            seconds = time.perf_counter() - start
            rows.append(Epoch(number, frozen, loss, accuracy, seconds, graphs_compiled() - before))
            twin.train(data, epoch_seed, frozen, after_step)
            twin.evaluate(data)
    trace = ours.trace()
    return Result(
        rows,
        differences(trace, twin.trace()),
        mode_vectors=len(twin.vectors),  # as PyTorch's own train() and eval() set them
        graphs=rows[-1].graphs,
        batches_tracked={name: int(count) for name, count in trace["num_batches_tracked"].items()},
    )


def freezes(number: int, epochs: int) -> bool:
    """Whether ``block2.bn`` is frozen in epoch ``number``, counted from 1, of ``epochs``."""
    return number > (epochs + 1) // 2


def differences(ours: Trace, twins: Trace) -> dict[str, float]:
    """The largest absolute difference for each of COMPARED; infinite where the two don't name the same tensors."""
    return {what: _largest(ours[what], twins[what]) for what in COMPARED}


def report(result: Result, console: Console) -> None:
    """Prints what happened in each epoch, and what was verified."""
    table = Table(title="the compiled module", caption="frozen: model.block2.bn.eval() after model.train()")
    for title in ("epoch", "block2.bn", "loss", "test accuracy", "seconds", "graphs so far"):
        table.add_column(title, justify="left" if title == "block2.bn" else "right")
    for row in result.epochs:
        mode = "frozen" if row.frozen else "trains"
        cells = (f"{row.loss:.4f}", f"{row.accuracy:.1%}", f"{row.seconds:.2f}", str(row.graphs))
        table.add_row(str(row.number), mode, *cells)
    console.print(table)

    table = Table(title=f"against the eager twin, tolerance {TOLERANCE:g}")
    table.add_column("compared")
    table.add_column("largest difference", justify="right")
    table.add_column("verdict")
    for what, difference in result.differences.items():
        table.add_row(what, f"{difference:.2e}", "ok" if difference <= TOLERANCE else "DISAGREES")
    console.print(table)

    counts = ", ".join(f"{name.removesuffix('.num_batches_tracked')} {n}" for name, n in result.batches_tracked.items())
    console.print(f"batches tracked: {counts}")
    compiles = "ok" if result.graphs == result.mode_vectors else "WRONG"
    console.print(f"graphs compiled: {result.graphs}, mode vectors used: {result.mode_vectors}: {compiles}")
    console.print("the compiled module trained like its eager twin" if result.ok else "FAILED: see above")


def main(epochs: int, seed: int) -> int:
    """Trains behind a progress bar and reports; returns the exit status."""
    data, console = Data.load(), Console(highlight=False)
    console.print("torch.compile(bind(exported), backend='pt2e_modes') beside an eager twin")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training steps, both", total=2 * epochs * data.steps)
        result = train(data, epochs, seed, lambda: progress.advance(task))
    report(result, console)
    return 0 if result.ok else 1


def _export(module: nn.Module, data: Data) -> nn.Module:
    shapes = ({0: torch.export.Dim("batch")},)
    bound: nn.Module = bind(torch.export.export(module.train(), (data.images[:BATCH],), dynamic_shapes=shapes))
    return bound


def _largest(ours: Mapping[str, Tensor], twins: Mapping[str, Tensor]) -> float:
    if ours.keys() != twins.keys() or not twins:
        return math.inf
    # Tensor.max, unlike Python's, hands NaN on.
    return float(torch.stack([(ours[name].double() - twins[name].double()).abs().max() for name in twins]).max())
