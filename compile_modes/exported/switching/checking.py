"""Whether a tree does in given modes what an export in these modes does."""

from collections.abc import Iterator
from typing import Any

from compile_modes.exported.switching.aligning import align
from compile_modes.exported.switching.traces import Op, Trace, Unmatched, Vector, is_value
from compile_modes.exported.switching.trees import Items, Phi, Switch, Tree
from compile_modes.exported.switching.verdicts import Decision, literal


def all_ops(items: Items) -> Iterator[Op]:
    """The ops of both branches of all switches."""
    for item in items:
        if isinstance(item, Switch):
            yield from all_ops(item.train)
            yield from all_ops(item.evaluation)
        else:
            yield item


def observe(tree: Tree, program: Trace) -> None:
    """Notes what a program says of the modes of ops.

    Raises:
        Unmatched: the tree, in the modes that the program was exported in, is another program.
    """
    for theirs, ours in _same_ops(tree, program).items():
        ours.seen += theirs.seen
        ours.counter = ours.counter or theirs.counter


def compare(tree: Tree, decisions: dict[Op, Decision], program: Trace) -> None:
    """Compares the tree, in the modes that a program was exported in, with the program.

    Raises:
        Unmatched: it is another one: where.
    """
    _Comparison(decisions, program.vector, _same_ops(tree, program)).run(tree, program)


def _same_ops(tree: Tree, program: Trace) -> dict[Op, Op]:
    """The ops of the tree by those of a program."""
    ours = [op for op in _in_modes(tree.items, program.vector) if not op.is_layout]
    theirs = [op for op in program.ops if not op.is_layout]
    env: dict[Op, Op] = {}
    stretches = align(ours, theirs)
    other = [op for equal, a, b in stretches if not equal for op in (*a, *b)]
    if other:
        raise Unmatched(f"in other modes, {_said(other[0])}", {op.owner for op in other})
    for _, a, b in stretches:
        env.update(zip(b, a, strict=True))
    return env


class _Comparison:
    def __init__(self, decisions: dict[Op, Decision], vector: Vector, env: dict[Op, Op]) -> None:
        self.decisions, self.vector, self.env = decisions, vector, env

    def run(self, tree: Tree, program: Trace) -> None:
        for theirs, ours in self.env.items():
            if not self.same((ours.args, list(ours.kwargs.values())), (theirs.args, list(theirs.kwargs.values()))):
                raise Unmatched(f"in other modes, the operands of {_said(ours)}", {ours.owner})
            mode = literal(theirs.row, theirs.node) if theirs.row is not None else None
            known = ours in self.decisions and self.decisions[ours].verdict.how
            if mode is not None and known and self.mode(ours) is not mode:
                raise Unmatched(f"in other modes, the mode of {_said(ours)}", {ours.owner})
        if not self.same(tree.outputs, program.outputs):
            raise Unmatched("in other modes, what is returned", {""})

    def mode(self, op: Op) -> bool:
        decision = self.decisions.get(op)
        return decision is not None and decision.verdict.mode(self.vector)

    def same(self, ours: Any, theirs: Any) -> bool:
        if is_value(ours) or is_value(theirs):
            a, b = self.ours(ours), self.theirs(theirs)
            return a is b or (not isinstance(a, Op) and a == b)
        if isinstance(ours, tuple | list):
            return len(ours) == len(theirs) and all(map(self.same, ours, theirs))
        return True

    def ours(self, value: Any) -> Any:
        """What a value of the tree is in these modes."""
        while True:
            if isinstance(value, Phi):
                value = value.train if self.vector(value.switch.decider) else value.evaluation
            elif isinstance(value, Op) and (value.is_layout or (value.is_dropout and not self.mode(value))):
                value = value.args[0]
            else:
                return value

    def theirs(self, value: Any) -> Any:
        while isinstance(value, Op) and value.passes_on:
            value = value.args[0]
        return self.env.get(value, value) if isinstance(value, Op) else value


def _in_modes(items: Items, vector: Vector) -> Iterator[Op]:
    for item in items:
        if isinstance(item, Switch):
            yield from _in_modes(item.train if vector(item.decider) else item.evaluation, vector)
        else:
            yield item


def _said(op: Op) -> str:
    return f"{op.node.target} (owner {op.owner!r})"
