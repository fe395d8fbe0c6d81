"""Who decides what differs between the programs of a model: found by exporting it in more modes.

What an op depends on is the mode of its owner, of a module around it, or of another one whose mode the model reads.
Programs whose modules train down to some depth and no further tell these apart, for the whole model at once.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes.exported.switching.switches import Program, differing, may_decide
from compile_modes.exported.switching.traces import Trace, Unmatched, Vector, ancestors, depth_of, trace
from compile_modes.graph.edits import own
from compile_modes.graph.view import View

Probe = Callable[[Vector], ExportedProgram]  # exports the model in given modes
_MOST = 5  # exports to find who decides


@dataclass(frozen=True)
class Witness:
    """An export in which some modules are in eval and all others train."""

    program: ExportedProgram
    asleep: frozenset[str]

    def vector(self, name: str) -> bool:
        """The mode of each module."""
        return name not in self.asleep


@dataclass
class Explored:
    """Exports in modes between eval and train.

    Attributes:
        programs: by the depth down to which modules trained.
        witnesses: programs in yet other modes, to compare with; the first shows what runs in eval only, where
            modules other than those that decide have ops there.
        deciders: modules that decide something by their own mode, as far as it was found out.
    """

    programs: dict[int, ExportedProgram] = field(default_factory=dict)
    witnesses: list[Witness] = field(default_factory=list)
    deciders: set[str] = field(default_factory=set)


def explore(
    model: nn.Module,
    evaluation: Trace,
    train: Trace,
    probe: Probe,
    readers: Collection[str] | None = None,
    root: bool | None = None,
    unclear: Collection[str] = (),
) -> Explored:
    """Exports a model until it is told which depth decides about each op that differs, and one to three times more.

    Args:
        model: the eager module; its modes are changed by ``probe``.
        evaluation, train: the programs of the two modes; with ``root``, of submodules.
        probe: exports the model in the modes that a vector says.
        readers: the modules whose mode the model reads; may grow with each export.
        root: the mode that the root stays in, if it does.
        unclear: those of ``readers`` of which it isn't known what their mode is read for.
    """
    start = -1 if root is None else 0
    found = Explored()
    deepest = max(map(depth_of, (*(op.owner for op in differing(evaluation, train)), *(readers or ()))), default=0)
    traces: dict[float, Trace] = {start: evaluation, math.inf: train}

    def refine(low: float, high: float) -> None:
        ops = differing(traces[low], traces[high])
        top = int(min(high, deepest))
        if top <= low + 1 or all(len(may_decide(op.owner, low, high, readers)) == 1 for op in ops):
            return
        if len(found.programs) == _MOST:
            raise Unmatched("modules of too many depths decide")
        middle = top - 1 if top - low <= 3 else int(low + top) // 2
        vector = depth_vector(middle, root)
        found.programs[middle] = probe(vector)
        traces[middle] = trace(fresh(found.programs[middle]), vector)
        refine(low, middle)
        refine(middle, high)

    refine(start, math.inf)
    hidden = False
    for low, high in itertools.pairwise(sorted(traces)):
        before = set(traces[low].ops)
        for op in differing(traces[low], traces[high]):
            deciders = may_decide(op.owner, low, high, readers)
            found.deciders.update(deciders)
            hidden |= op in before and any(depth_of(op.owner) > depth_of(name) for name in deciders)
    if hidden:
        asleep = frozenset(found.deciders | ({""} if root is False else set()))
        witness = Witness(probe(lambda name: name not in asleep), asleep)
        found.witnesses.append(witness)
        new = differing(evaluation, trace(fresh(witness.program), witness.vector))
        found.deciders |= {name for op in new for name in ancestors(op.owner)}
    if root is not None and not found.deciders and not unclear:
        return found
    others = set(unclear) - found.deciders
    for training in (False, True) if others or len(found.deciders) > 1 else (False,):
        vector = mixed(model, found.deciders, others, training, root)
        asleep = frozenset(name for name, _ in model.named_modules(remove_duplicate=False) if not vector(name))
        found.witnesses.append(Witness(probe(vector), asleep))
    return found


def depth_vector(depth: float, root: bool | None = None) -> Vector:
    """The modes of which modules that are at most so deep train, but for the root if its mode is given."""
    return lambda name: root if root is not None and not name else depth_of(name) <= depth


def mixed(
    model: nn.Module, deciders: Collection[str], others: Collection[str], training: bool, root: bool | None = None
) -> Vector:
    """Modes in which what was taken to decide is in one, every other time, and what else is read is in the other.

    So an op that depends on both shows. Modules of which nothing is read are in the former, if there are any of the
    latter; else those side by side differ, and what is first in a module and the module itself.

    Args:
        model: the eager module.
        deciders: modules that were taken to decide.
        others: other modules whose mode the model reads, and it isn't known what for.
        training: the mode of the first of ``deciders``.
        root: the mode of the root, if it is to have one.
    """
    modes = {"": True}

    def visit(name: str, module: nn.Module) -> None:
        for index, (leaf, child) in enumerate(module.named_children()):
            path = f"{name}.{leaf}" if name else leaf
            modes[path] = modes[name] is bool(index % 2)
            visit(path, child)

    visit("", model)
    if others:
        modes = dict.fromkeys(modes, training)
    modes |= dict.fromkeys(others, not training)
    modes |= {name: bool(index % 2) is not training for index, name in enumerate(sorted(deciders))}
    if root is not None:
        modes[""] = root
    return lambda name: modes.get(name, True)


def fresh(program: ExportedProgram) -> fx.GraphModule:
    """The module of a program, with bodies of its own."""
    root = program.module()
    own(View(root))
    assert isinstance(root, fx.GraphModule)
    return root


def chain(
    programs: dict[int, ExportedProgram],
    evaluation: fx.GraphModule,
    train: fx.GraphModule,
    mode: bool | None = None,
) -> Sequence[Program]:
    """Programs by depth, from eval to train; with ``mode``, the one that the root is in, of its submodules."""
    between = [Program(fresh(programs[depth]), depth, mode) for depth in sorted(programs)]
    return [Program(evaluation, -1 if mode is None else 0, mode), *between, Program(train, math.inf, mode)]
