"""Which value of one program stands for which of another, where the two differ.

Where one module decides, this is plain: the two values that one and the same op reads. Where several do, one after the
other, the value between them has to be found: what the later one reads on one side stands for what it hands on, on the
other. What is left unclear is refused with :class:`Unmatched`.
"""

from typing import Any

from compile_modes.exported.switching.traces import Held, Input, Op, Unmatched, is_value, values_of
from compile_modes.exported.switching.trees import Phi, Piece, Place, Progress, Switch, top


class Values:
    """The values of one step of merging."""

    def __init__(self, step: Progress) -> None:
        self.step = step
        self.phis: dict[tuple[int, int], Any] = {}

    def paired(self, old: Any, new: Any, consumer: Op | None) -> Any:
        """The arguments of an op that both have: values that are right in both, all else as the new program has it."""
        if is_value(old) and is_value(new):
            return self._resolve(old, new, consumer)
        if isinstance(old, tuple | list) and isinstance(new, tuple | list) and len(old) == len(new):
            paired = [self.paired(a, b, consumer) for a, b in zip(old, new, strict=True)]
            return paired if isinstance(new, list) else tuple(paired)
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            return {name: self.paired(old[name], new[name], consumer) for name in old}
        if is_value(old) or is_value(new) or isinstance(old, tuple | list | dict):
            raise Unmatched("the structure of the outputs" if consumer is None else f"arguments of {consumer.node}")
        if consumer is None and (type(old) is not type(new) or old != new):
            raise Unmatched(f"the outputs: {new!r} and {old!r}")
        return new

    def _resolve(self, old: Any, new: Any, consumer: Op | None) -> Any:
        if (same := self._corresponding(old, new)) is not None:
            return same
        known = self.phis.get((id(old), id(new)))
        if known is not None:
            return known
        made = self._phi(old, new, consumer)
        if not (isinstance(made, Phi) and made.switch not in {p.switch for p in self.step.pieces}):
            self.phis[id(old), id(new)] = made
        return made

    def _corresponding(self, old: Any, new: Any) -> Any:
        """The value, if both are one: in eval, what a dropout returns may stand for what it was given."""
        chains = []
        chain = [old]
        while isinstance(op := top(chain[-1]), Op) and is_value(self.step.passed.get(op)):
            chain.append(self.step.passed[op])
        chains.append(chain)
        chain = [new]
        while isinstance(op := chain[-1], Op) and op.passes_on and is_value(op.args[0]):
            chain.append(op.args[0])
        chains.append(chain)
        for j, theirs in enumerate(chains[1]):
            match = self.step.env.get(theirs, theirs) if isinstance(theirs, Op) else theirs
            for i, ours in enumerate(chains[0]):
                if top(ours) is match or (isinstance(match, Held | Input) and top(ours) == match):
                    return old if j else chains[0][i]
        return None

    def _phi(self, old: Any, new: Any, consumer: Op | None) -> Any:
        theirs, ours = self.step.piece_of.get(new), self.step.piece_of.get(top(old))
        later = max((p for p in (theirs, ours) if p is not None), key=lambda p: p.position, default=None)
        if later is None:
            return self._select(
                self.step.decide(consumer, [consumer] if consumer is not None else []), old, new, consumer
            )
        if isinstance(old, Phi) and any(items is old.switch.train for items in later.place):
            # Within a branch of the switch that the old value leaves: so does what takes its place.
            phi = Phi(old.switch, self._resolve(old.train, new, consumer), old.evaluation)
            old.switch.phis.append(phi)
            return phi
        late = max(self._position(old), self._position(self.step.env.get(new, new)))
        if late > later.position:
            return self._select(later.decider, old, new, consumer)
        if later is theirs:
            passed, evaluation = None, self._while_off(later, ours, old)
            phi = Phi(later.switch, new, evaluation)
        else:
            passed = self._while_on(later, theirs, new)
            phi = Phi(later.switch, passed, old)
        later.switch.phis.append(phi)
        return phi

    def _position(self, value: Any) -> int:
        return self.step.positions.get(top(value), -1) if isinstance(top(value), Op) else -1

    def _while_off(self, piece: Piece, ours: Piece | None, old: Any) -> Any:
        """What stands for ``old`` before a piece that a module further on has left out, where others train."""
        if ours is piece:
            return old
        shape = _shape(old)
        read = {
            v
            for op in piece.new
            for v in values_of((op.args, op.kwargs))
            if (q := self.step.piece_of.get(v)) is not None and q.decider != piece.decider and v.shape == shape
        }
        if len(read) > 1:
            raise Unmatched(f"{len(read)} values may stand for {_name(old)} before {_name(piece.new[0])}")
        if read:
            return self._resolve(old, read.pop(), None)
        if ours is not None and ours is not piece and ours.decider != piece.decider:
            raise Unmatched(
                f"what stands for {_name(old)} where {ours.decider!r} is not in the mode of {piece.decider!r}"
            )
        return old

    def _while_on(self, piece: Piece, theirs: Piece | None, new: Any) -> Any:
        """The reverse of :meth:`_while_off`: what stands for ``new`` before a piece that is run in eval only."""
        shape = _shape(new)
        read = [
            v
            for op in piece.old
            for v in values_of((op.args, op.kwargs))
            if (other := self.step.piece_of.get(top(v))) is not None
            and other.decider != piece.decider
            and _shape(v) == shape
        ]
        if len(set(map(id, read))) > 1:
            raise Unmatched(f"{len(read)} values may stand for {_name(new)} before {_name(piece.old[0])}")
        if read:
            return self._resolve(read[0], new, None)
        if theirs is not None and theirs is not piece and theirs.decider != piece.decider:
            raise Unmatched(
                f"what stands for {_name(new)} where {theirs.decider!r} is not in the mode of {piece.decider!r}"
            )
        return self.read(new, (*piece.place, piece.switch.train), piece)

    def _select(self, decider: str, old: Any, new: Any, consumer: Op | None) -> Phi:
        """A switch that only passes something on, just before it is used."""
        place = self.step.places[consumer] if consumer is not None else (self.step.tree.items,)
        switch = Switch(decider)
        index = next((i for i, item in enumerate(place[-1]) if item is consumer), len(place[-1]))
        place[-1].insert(index, switch)
        self.step.places[switch] = place
        switch.phis.append(Phi(switch, self.read(new, (*place, switch.train), None, decider), old))
        return switch.phis[0]

    def read(self, value: Any, at: Place, piece: Piece | None, decider: str | None = None) -> Any:
        """What an op of the new program reads, at its place in the tree."""
        if not isinstance(value, Op):
            return value
        decider = piece.decider if piece is not None else decider
        other = self.step.piece_of.get(value)
        if other is not None and value not in self.step.env and other is not piece and other.decider != decider:
            found = [phi for phi in other.switch.phis if phi.train is value]
            if not found:
                raise Unmatched(f"what stands for {_name(value)} where {other.decider!r} is in eval")
            return found[0]
        return self._visible(self.step.env.get(value, value), at, decider)

    def read_old(self, value: Any, piece: Piece) -> Any:
        """What an op of an eval branch reads: of other pieces, what stands for it where their modules train."""
        other = self.step.piece_of.get(top(value))
        if other is None or other is piece or other.decider == piece.decider:
            return value
        found = [phi for phi in other.switch.phis if phi.evaluation is value]
        if not found:
            raise Unmatched(f"what stands for {_name(value)} where {other.decider!r} trains")
        return found[0]

    def _visible(self, value: Op, at: Place, decider: str | None) -> Any:
        """A value of the tree as it can be seen from a place: from outside of a branch, as what leaves its switch."""
        found: Any = value
        for items in reversed(self.step.places.get(value, ())):
            switch = self.step.lists.get(id(items))
            if switch is None or any(items is seen for seen in at):
                continue
            leaving = [phi for phi in switch.phis if top(phi) is value]
            if leaving:
                found = leaving[0]
            elif switch.decider != decider:
                raise Unmatched(f"what stands for {value.node} where {switch.decider!r} is in eval")
        return found


def _shape(value: Any) -> Any:
    value = top(value)
    return value.shape if isinstance(value, Op) else getattr(getattr(value, "value", None), "shape", None)


def _name(value: Any) -> str:
    value = top(value)
    return f"{value.node} (owner {value.owner!r})" if isinstance(value, Op) else str(value)
