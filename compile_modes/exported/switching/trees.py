"""A graph with switches: ops in their order, and stretches of which there are two."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from compile_modes.exported.switching.traces import Op


@dataclass(eq=False)
class Switch:
    """Two branches, and the path of the module whose mode chooses."""

    decider: str
    train: "Items" = field(default_factory=list)
    evaluation: "Items" = field(default_factory=list)
    phis: list["Phi"] = field(default_factory=list)


@dataclass(eq=False)
class Phi:
    """A value that leaves a switch: one of two."""

    switch: Switch
    train: Any
    evaluation: Any
    is_phi = True


Items = list[Op | Switch]
Place = tuple[Items, ...]  # the lists around an item, the outermost first


@dataclass
class Tree:
    """The merged program."""

    items: Items
    outputs: Any


def top(value: Any) -> Any:
    """What a value is where all deciders train."""
    while isinstance(value, Phi):
        value = value.train
    return value


def path(items: Items, place: Place = ()) -> Iterator[tuple[Op, Place]]:
    """The ops that run where all deciders train, with where they stand."""
    place = (*place, items)
    for item in items:
        if isinstance(item, Switch):
            yield from path(item.train, place)
        else:
            yield item, place


@dataclass(eq=False)
class Piece:
    """Ops of the old and the new program that take each other's place, decided by one module."""

    decider: str
    old: list[Op]
    new: list[Op]
    position: int
    switch: Switch
    place: Place = ()


@dataclass(eq=False)
class Progress:
    """One program on its way into a tree.

    Attributes:
        tree: the tree, and ``decide`` says which module decides about an op, or, of None, about what is returned.
        places: the lists around each item that runs where all deciders train.
        passed: what ops pass on in the old program: their nodes become the new program's while they are paired.
        env: ops of the new program that the tree has.
        pieces: what differs, and ``piece_of`` the piece of each op in one.
        positions: the order of ops.
        lists: the switch whose train branch a list is, by the id of the list.
    """

    tree: Tree
    decide: Callable[..., str]
    places: dict[Any, Place] = field(default_factory=dict)
    passed: dict[Op, Any] = field(default_factory=dict)
    env: dict[Op, Op] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    piece_of: dict[Any, Piece] = field(default_factory=dict)
    positions: dict[Any, int] = field(default_factory=dict)
    lists: dict[int, Switch] = field(default_factory=dict)
