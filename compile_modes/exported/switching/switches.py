"""One graph for what Python decides by ``training``, module by module: switches between programs of several modes."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import fx

from compile_modes.exported.pairing import structure_that_differs
from compile_modes.exported.switching.aligning import align, probability
from compile_modes.exported.switching.checking import all_ops, compare, observe
from compile_modes.exported.switching.emitting import emit, prune
from compile_modes.exported.switching.merging import Decide, merge
from compile_modes.exported.switching.traces import Op, Trace, Unmatched, Vector, ancestors, depth_of, trace
from compile_modes.exported.switching.trees import Tree
from compile_modes.exported.switching.verdicts import decided
from compile_modes.graph.owners import module_path


@dataclass
class Merged:
    """What :class:`OneGraph` made of the programs.

    Attributes:
        bound: nodes whose flag follows the module that owns them.
        fixed: nodes that have their mode whatever the flag.
        inverted: nodes in eval when their owner trains, with the probability that the train export has lost.
        lost: probabilities of nodes in ``bound`` that run in eval only, where they are 0.
        switches: calls of ``calls.switch``.
        kept_steps: nodes of batch norms whose counter steps in both modes.
        counting: nodes of ``fixed`` whose counter steps in train only.
    """

    bound: list[fx.Node] = field(default_factory=list)
    fixed: list[fx.Node] = field(default_factory=list)
    inverted: dict[fx.Node, float | None] = field(default_factory=dict)
    lost: dict[fx.Node, float] = field(default_factory=dict)
    switches: list[fx.Node] = field(default_factory=list)
    kept_steps: set[fx.Node] = field(default_factory=set)
    counting: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class Program:
    """One export: the module of its program, and which modules trained: those that are at most so deep.

    Attributes:
        root: the module.
        depth: the depth.
        mode: the mode of the model's root, where that is another one.
    """

    root: fx.GraphModule
    depth: float
    mode: bool | None = None

    def vector(self, name: str) -> bool:
        return self.mode if self.mode is not None and not name else depth_of(name) <= self.depth


class OneGraph:
    """The merging of programs: each step of depth decides what differs between two of them.

    Args:
        programs: at least that of eval mode (depth -1) and of train mode (depth infinite), by depth.
        seen: programs in other modes, and these, which say more of the modes of ops, and are compared with.
        readers: the modules whose mode the model reads; None if that isn't known.
        guess: whether the module around all that differs in one place is taken for the one that decides.

    Raises:
        Unmatched: they can't be one, or not one that is ``seen``.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        seen: Sequence[tuple[Vector, fx.GraphModule]] = (),
        *,
        readers: Collection[str] | None = None,
        guess: bool = False,
    ) -> None:
        first = trace(programs[0].root, programs[0].vector)
        self.tree = Tree(list(first.ops), first.outputs)
        self.root = programs[-1].root
        for program in programs[:-1]:
            if different := structure_that_differs(program.root.graph, programs[-1].root.graph):
                raise Unmatched(different)
        self.follows_owners = True  # whether each op that differs is decided by the module that it is of
        for before, after in itertools.pairwise(programs):
            decide = decider_between(before.depth, after.depth, readers, guess=guess)
            pieces = merge(self.tree, trace(after.root, after.vector), decide)
            self.follows_owners &= all(op.owner == p.decider for p in pieces for op in (*p.old, *p.new))
        prune(self.tree)
        traces = [trace(root, vector) for vector, root in seen]
        for other in traces:
            observe(self.tree, other)
        self.decisions = dict(decided(all_ops(self.tree.items), readers or ()))
        self.follows_owners &= all(
            not d.verdict.varied or d.verdict.owner == op.owner for op, d in self.decisions.items()
        )
        for other in traces:
            compare(self.tree, self.decisions, other)

    def emit(self) -> Merged:
        """Makes the graph that of the train program's module, in place."""
        emitted, merged = emit(self.root, self.tree), Merged()
        for op, decision in self.decisions.items():
            if op not in emitted.ops:
                continue
            node = emitted.ops[op]
            for site, verdict in ((node, decision.verdict), *decision.inner):
                if verdict.how == "bound":
                    own_flag(site, verdict.owner)
                    merged.bound.append(site)
                    if verdict.p and probability(site) == 0:
                        merged.lost[site] = verdict.p
                elif verdict.how == "inverted":
                    own_flag(site, verdict.owner)
                    merged.inverted[site] = verdict.p
                elif verdict.how == "fixed":
                    merged.fixed.append(site)
            if op.counter is not None and all(counts for _, _, counts in op.seen):
                merged.kept_steps.update([node] if decision.verdict.varied else [])
            elif op.counter is not None and decision.verdict.how == "fixed":
                merged.counting.add(node)
        merged.switches = list(emitted.switches.values())
        return merged


def decider_between(low: float, high: float, readers: Collection[str] | None = None, *, guess: bool = False) -> Decide:
    """Who decides what differs between two programs, if the modules that are ``low < depth <= high`` differ in mode."""

    def decide(op: Op | None, stretch: Sequence[Op]) -> str:
        if guess:
            return _around([op.owner for op in stretch])
        of = f"{op.node.target} (owner {op.owner!r})" if op is not None else "what is returned"
        may = may_decide(op.owner if op is not None else "", low, high, readers)
        if op is not None and op.is_layout:  # the same values either way
            return next(iter(may), "")
        if not may:
            raise Unmatched(f"{of} depends on the mode of a module inside of its own")
        if len(may) > 1:
            raise Unmatched(f"which module decides about {of}")
        return may[0]

    return decide


def may_decide(owner: str, low: float, high: float, readers: Collection[str] | None = None) -> list[str]:
    """The modules that may decide about an op: its owner and those around it, or else another one that reads its mode.

    Args:
        owner: the module whose op it is.
        low, high: the modules that differ in mode are ``low < depth <= high``.
        readers: the modules whose mode the model reads; None if that isn't known.
    """
    around = [name for name in ancestors(owner) if low < depth_of(name) <= high]
    if readers is None:
        return around
    return [n for n in around if n in readers] or sorted(n for n in readers if low < depth_of(n) <= high)


def _around(owners: Sequence[str]) -> str:
    """The innermost module that is around all these."""
    paths = [owner.split(".") if owner else [] for owner in owners]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


def differing(first: Trace, second: Trace) -> list[Op]:
    """The ops that only one of two programs has."""
    return [op for equal, a, b in align(first.ops, second.ops) if not equal for op in (*a, *b) if not op.is_layout]


def own_flag(node: fx.Node, owner: str) -> None:
    """Makes a module the owner of a node whose flag it hands to another one."""
    if module_path(node) != owner:
        stack = dict(node.meta.get("nn_module_stack") or {})
        node.meta["nn_module_stack"] = {**stack, f"flag of {owner}": (owner, "torch.nn.modules.module.Module")}
