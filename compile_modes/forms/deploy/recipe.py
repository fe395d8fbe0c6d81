"""How the constants of a frozen graph are computed from its weights: recorded while it is folded, and run again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Slot:
    """A value of a recipe: weights come first, then the results of its steps."""

    index: int


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        target: what is called.
        args: its arguments, with slots for values.
        kwargs: the same.
        needs: the weights that the result follows from.
    """

    target: Callable[..., Any]
    args: Any
    kwargs: Any
    needs: frozenset[int]


@dataclass
class Recipe:
    """The steps from weights to constants.

    Attributes:
        weights: the tensors that it is recorded on; how many there are stays what it is.
        steps: in an order in which they can be run.
        named: the value that a constant of the graph is, by its name there.
    """

    weights: list[torch.Tensor]
    steps: list[Step] = field(default_factory=list)
    named: dict[str, Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._count = len(self.weights)
        self._known: dict[Any, Slot] = {}

    def record(self, gm: fx.GraphModule, node: fx.Node, constant: torch.Tensor) -> Callable[[str], None]:
        """Notes what a node consists of that is about to be a constant; call the result with the constant's name."""
        if node.op == "placeholder":
            slot = Slot(next(index for index, weight in enumerate(self.weights) if weight is constant))
        else:
            slot = self._slot(gm, node)

        def name(given: str) -> None:
            self.named[given] = slot

        return name

    def forget_weights(self) -> None:
        """Lets go of the tensors that it was recorded on."""
        self.weights, self._known = [], {}

    def needs(self, slot: Slot) -> frozenset[int]:
        """The weights that a value follows from."""
        return frozenset((slot.index,)) if slot.index < self._count else self.steps[slot.index - self._count].needs

    def run(self, slots: Iterable[Slot], weights: Sequence[torch.Tensor]) -> dict[Slot, torch.Tensor]:
        """Computes values, each on memory of its own, from these weights as they are now."""
        slots = list(slots)
        values: list[Any] = [*weights, *[None] * len(self.steps)]
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        for index in sorted(self._before(slots)):
            step = self.steps[index - self._count]
            args, kwargs = _given((step.args, step.kwargs), values)
            values[index] = step.target(*args, **kwargs)
        return {slot: _apart(values[slot.index], own) for slot in slots}

    def _before(self, slots: Iterable[Slot]) -> set[int]:
        """The steps that values take."""
        found: set[int] = set()
        todo = [slot.index for slot in slots]
        while todo:
            index = todo.pop()
            if index >= self._count and index not in found:
                found.add(index)
                step = self.steps[index - self._count]
                todo += [slot.index for slot in _slots((step.args, step.kwargs))]
        return found

    def _slot(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        """What a node is in this recipe: a value, or a tensor that follows from no weight."""
        if node.op == "get_attr":
            return self.named[str(node.target)] if str(node.target) in self.named else getattr(gm, str(node.target))
        if node.op != "call_function":
            raise ValueError(f"{node.op} {node.target} can't be recorded")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._slot(gm, n))
        key = (node.target, _key(args), _key(kwargs))
        if key not in self._known:
            needs = frozenset().union(*(self.needs(slot) for slot in _slots((args, kwargs))))
            assert callable(node.target)
            self.steps.append(Step(node.target, args, kwargs, needs))
            self._known[key] = Slot(self._count + len(self.steps) - 1)
        return self._known[key]


def _slots(value: Any) -> list[Slot]:
    if isinstance(value, Slot):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [slot for item in value for slot in _slots(item)]


def _given(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, Mapping):
        return {key: _given(item, values) for key, item in value.items()}
    if isinstance(value, list | tuple):  # fx keeps lists in a class of its own
        return (tuple if isinstance(value, tuple) else list)(_given(item, values) for item in value)
    return value


def _key(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return id(value) if isinstance(value, torch.Tensor) else (type(value), value)


def _apart(value: torch.Tensor, own: set[int]) -> torch.Tensor:
    """The value, copied if its memory is that of a weight, which may be written to at any time."""
    if value.layout != torch.strided or value.untyped_storage().data_ptr() not in own:
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if not value.numel():
        return value
    return value.as_strided((extent,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
