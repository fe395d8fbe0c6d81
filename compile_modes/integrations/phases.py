"""How many graphs each loop of a trainer has compiled, and how long that has held it up."""

import time
from dataclasses import dataclass, field

from compile_modes import messages
from compile_modes._compat.frames import graphs_compiled
from compile_modes.console import table

WARMUP = "warm-up"
TRAIN = "train"


@dataclass
class Phase:
    """One loop over a data set, or a warm-up.

    Attributes:
        name: ``"train"``, ``"validation"``, ``"test"``, ``"predict"`` or ``"warm-up"``.
        number: counts the phases of one name, from 1.
        steps: how many batches it had; in training with accumulation, a batch counts each time.
        graphs: how many graphs Dynamo has compiled in it. A warm-up within a loop is a phase of its own.
        stalled: wall time, in seconds, of the steps that compiled something: compilation and the step itself.
    """

    name: str
    number: int
    steps: int = 0
    graphs: int = 0
    stalled: float = 0.0


@dataclass
class Phases:
    """The phases so far, in the order in which they began.

    Attributes:
        all: every phase.
    """

    all: list[Phase] = field(default_factory=list)
    _open: dict[str, Phase] = field(default_factory=dict)
    _time: float = 0.0
    _graphs: int = 0

    def mark(self) -> None:
        """A step begins here: what was before belongs to no phase."""
        self._time, self._graphs = time.perf_counter(), graphs_compiled()

    def step(self, name: str) -> None:
        """A step of the named loop has ended; begins the loop if it hasn't begun."""
        if name not in self._open:
            self._open[name] = self._begin(name)
        phase = self._open[name]
        graphs, seconds = graphs_compiled() - self._graphs, time.perf_counter() - self._time
        phase.steps += 1
        if graphs > 0:
            phase.graphs += graphs
            phase.stalled += seconds
        self.mark()

    def end(self, name: str) -> None:
        """The named loop has ended. From the second on, one that is no training should have compiled nothing.

        Warns:
            ModeWarning: it has, with how long that took.
        """
        phase = self._open.pop(name, None)
        if phase is not None and phase.graphs and phase.number > 1 and name != TRAIN:
            seconds = f"{phase.stalled:.1f}"
            messages.COMPILED_AGAIN.warn(loop=name, number=phase.number, graphs=phase.graphs, seconds=seconds)

    def warm_up(self, graphs: int, seconds: float) -> None:
        """Counts a warm-up, and keeps it out of the step that it has interrupted."""
        phase = self._begin(WARMUP)
        phase.steps, phase.graphs, phase.stalled = 1, graphs, seconds
        self._graphs += graphs
        self._time += seconds

    def table(self) -> str:
        """All phases as text, a line each."""
        head = ["loop", "steps", "graphs compiled", "stalled"]
        rows = [[f"{p.name} {p.number}", str(p.steps), str(p.graphs), f"{p.stalled:.2f} s"] for p in self.all]
        return table(head, rows)

    def _begin(self, name: str) -> Phase:
        phase = Phase(name, 1 + sum(p.name == name for p in self.all))
        self.all.append(phase)
        return phase
