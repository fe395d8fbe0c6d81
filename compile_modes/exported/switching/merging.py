"""Programs of several modes as one: where they differ, a switch with two branches that a module's flag chooses between.

A tree starts as the program of eval mode. Each step takes one more program, whose modules of one more depth train, and
puts what it does otherwise beside what the tree does: into the train branch of a switch, with what stands there now as
the eval branch. So a switch may stand in the branch of another one, decided by a module further out.

In every mode the ops of that mode run in their order. What takes care is values: a value that differs has to leave its
switch as one (a :class:`Phi`). Where it can't be told which value of one program stands for which of the other, merging
gives up with :class:`Unmatched`.
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from compile_modes.exported.switching.aligning import align
from compile_modes.exported.switching.standing import Values
from compile_modes.exported.switching.traces import Op, Trace, Unmatched, ancestors, map_values, values_of
from compile_modes.exported.switching.trees import Items, Piece, Place, Progress, Switch, Tree, path

# The module whose flag decides whether an op that differs runs, or, of None, which output is returned; the second
# argument is all that differs with it.
Decide = Callable[[Op | None, Sequence[Op]], str]


def merge(tree: Tree, program: Trace, decide: Decide) -> list[Piece]:
    """Puts one more program into a tree, in place; returns the pieces that it does otherwise.

    Raises:
        Unmatched: the programs can't be told apart value by value. The tree is of no use then.
    """
    step = Step(tree, program, decide)
    step.run()
    return step.pieces


class Step(Progress):
    """One step of merging."""

    def __init__(self, tree: Tree, program: Trace, decide: Decide) -> None:
        super().__init__(tree, decide, dict(path(tree.items)))
        self.program, self.values = program, Values(self)
        self.passed = {op: op.args[0] for op in self.places if op.passes_on}
        self._note_lists(tree.items)

    def _note_lists(self, items: Items) -> None:
        for item in items:
            if isinstance(item, Switch):
                self.lists[id(item.train)] = item
                self._note_lists(item.train)
                self._note_lists(item.evaluation)

    def run(self) -> None:
        shared: list[tuple[Op, Op]] = []
        count = itertools.count()
        previous: Op | None = None
        ordered: list[Op] = list(self.places)
        following = dict(itertools.pairwise(ordered))
        stretches = align(ordered, self.program.ops)
        self._rank(stretches)
        for equal, old, new in stretches:
            if equal:
                for a, b in zip(old, new, strict=True):
                    self.env[b] = a
                    self.positions[a] = next(count)
                shared += zip(old, new, strict=True)
                previous = old[-1]
                continue
            last = old[-1] if old else previous
            after = following.get(last) if last is not None else next(iter(ordered), None)
            for piece in self._cut(old, new, count):
                self._place(piece, previous, after)
                previous = piece.old[-1] if piece.old else previous
        for a, b in shared:
            args = self.values.paired(a.args, b.args, a), self.values.paired(a.kwargs, b.kwargs, a)
            a.args, a.kwargs = args
            a.node, a.seen = b.node, [*a.seen, *b.seen]
            a.counter = a.counter or b.counter
        self.tree.outputs = self.values.paired(self.tree.outputs, self.program.outputs, None)
        for piece in self.pieces:
            inner = (*piece.place, piece.switch.train)
            for op in piece.new:
                read = functools.partial(self.values.read, at=inner, piece=piece)
                op.args, op.kwargs = map_values((op.args, op.kwargs), read)
            for op in piece.old:
                read = functools.partial(self.values.read_old, piece=piece)
                op.args, op.kwargs = map_values((op.args, op.kwargs), read)

    def _rank(self, stretches: Sequence[tuple[bool, list[Op], list[Op]]]) -> None:
        """Notes when each module comes up first, by the ops before that both programs have."""
        self.ranks: dict[str, int] = {}
        slot = 0
        for equal, old, new in stretches:
            for op in old if equal else (*old, *new):
                for name in ancestors(op.owner):
                    self.ranks.setdefault(name, slot)
                slot += equal

    # Where pieces stand

    def _cut(self, old: list[Op], new: list[Op], count: Iterator[int]) -> Iterator[Piece]:
        """Parts a stretch where another module decides."""
        for op in old:
            self.positions[op] = next(count)  # for ops that stay as they are; pieces overwrite it
        decide = functools.partial(self.decide, stretch=[*old, *new])
        sides = [[(d, list(ops)) for d, ops in itertools.groupby(side, key=decide)] for side in (old, new)]
        matcher = SequenceMatcher(None, [d for d, _ in sides[0]], [d for d, _ in sides[1]], autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            if tag == "equal":
                for (decider, ours), (_, theirs) in zip(sides[0][i1:i2], sides[1][j1:j2], strict=True):
                    yield self._piece(decider, ours, theirs, count)
            else:
                parts: list[list[tuple[str, list[Op], list[Op]]]]
                parts = [[(d, [], ops) for d, ops in sides[1][j1:j2]], [(d, ops, []) for d, ops in sides[0][i1:i2]]]
                for decider, ours, theirs in heapq.merge(*parts, key=lambda part: self.ranks.get(part[0], 0)):
                    yield self._piece(decider, ours, theirs, count)

    def _piece(self, decider: str, old: list[Op], new: list[Op], count: Iterator[int]) -> Piece:
        piece = Piece(decider, old, new, next(count), Switch(decider))
        self.pieces.append(piece)
        for op in (*old, *new):
            self.piece_of[op] = piece
            self.positions[op] = piece.position
        return piece

    def _place(self, piece: Piece, previous: Any, after: Op | None) -> None:
        """Puts the switch of a piece where its old ops stand, or between its neighbours."""
        switch = piece.switch
        if piece.old:
            places = [self.places[op] for op in piece.old]
            depth = min(map(len, places))
            while any(place[depth - 1] is not places[0][depth - 1] for place in places):
                depth -= 1
            items = places[0][depth - 1]
            inside = set(piece.old)
            covered = [i for i, item in enumerate(items) if inside & {op for op, _ in path([item])}]
            first, last = covered[0], covered[-1] + 1
            if {op for op, _ in path(items[first:last])} != inside:
                raise Unmatched(f"{piece.old[0].node.target} (owner {piece.old[0].owner!r}) is in parts of branches")
            switch.evaluation[:] = items[first:last]
            items[first:last] = [switch]
            place = places[0][:depth]
        else:
            place, anchor = self._between(piece, previous, after)
            index = next((i + 1 for i, item in enumerate(place[-1]) if item is anchor), 0)
            while index < len(place[-1]) and self._is_newer(place[-1][index], piece):
                index += 1
            place[-1].insert(index, switch)
        switch.train[:] = piece.new
        piece.place = self.places[switch] = place
        for op in piece.new:
            self.places[op] = (*place, switch.train)
        self.lists[id(switch.train)] = switch

    def _is_newer(self, item: Any, piece: Piece) -> bool:
        """Whether an item is an earlier piece of this step without old ops, which come first."""
        return any(item is p.switch and not p.old for p in self.pieces if p is not piece)

    def _between(self, piece: Piece, previous: Op | None, after: Op | None) -> tuple[Place, Any]:
        """The place between two ops, in the branch of a switch as long as its module's own code goes on."""
        before = self.places[previous] if previous is not None else (self.tree.items,)
        behind = self.places[after] if after is not None else (self.tree.items,)
        common = 0
        while common < min(len(before), len(behind)) and before[common] is behind[common]:
            common += 1
        owner = piece.new[0].owner
        beside = [op for op in (previous, after) if op is not None]
        near = max(beside, key=lambda op: _common(op.owner, owner), default=None)
        place = before if near is previous else behind
        read = [v for op in piece.new for v in values_of(op.args) if isinstance(v, Op)]
        needed = [self.places.get(self.env.get(value, value), ()) for value in read]
        inner = max((len(p) for p in needed if p[common:] and before[: len(p)] == p and not self._leaves(p)), default=0)
        place = before if inner > len(place) else place
        if place is before:
            anchor = self._item_at(place, previous) if previous is not None else None
            return place, anchor
        index = next(i for i, item in enumerate(place[-1]) if item is self._item_at(place, after))
        return place, place[-1][index - 1] if index else None

    def _leaves(self, place: Place) -> bool:
        return bool(self.lists[id(place[-1])].phis) if id(place[-1]) in self.lists else True

    def _item_at(self, place: Place, op: Any) -> Any:
        """The item of the innermost list of a place that is, or holds, an op."""
        if op in self.piece_of:
            return self.piece_of[op].switch
        return next((item for item in place[-1] if any(o is op for o, _ in path([item]))), None)


def _common(one: str, other: str) -> int:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
