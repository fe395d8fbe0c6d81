"""Nested inputs and outputs in JSON: what a package says of them, without the classes of the model.

A node is an object with one key that says what it is: ``{"tensor": 3}``, ``{"value": null}``, ``{"tuple": [...]}``,
``{"list": [...]}``, ``{"dict": [[key, node], ...]}``, ``{"named": [name, fields, nodes]}`` of a namedtuple, and
``{"record": [name, keys, nodes]}`` of any other class that torch's pytrees know.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Node = dict[str, Any]


class Record(dict[Any, Any]):
    """What a class of the model's comes back as: its values by name, by attribute, and by position."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and dict.__contains__(self, name):  # before what dicts have: ``values``, say
            return dict.__getitem__(self, name)
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) or (isinstance(key, int) and key not in self):
            return tuple(dict.values(self))[key]
        return super().__getitem__(key)


class Strange(Exception):
    """A value that JSON has no place for; the first argument says what it is."""


def describe(tree: Any, tensors: list[torch.Tensor]) -> Node:
    """A tree in JSON; its tensors are appended to a list.

    Raises:
        Strange: it holds something else than tensors, numbers, strings and None.
    """
    again = functools.partial(describe, tensors=tensors)
    kind = type(tree)
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return {"tensor": len(tensors) - 1}
    if tree is None or kind in (bool, int, str) or (kind is float and math.isfinite(tree)):
        return {"value": tree}
    if kind in (tuple, list):
        return {kind.__name__: [again(item) for item in tree]}
    if kind is dict:
        if strange := [key for key in tree if type(key) not in (str, int, bool)]:
            raise Strange(f"a dict with the key {strange[0]!r}")
        return {"dict": [[key, again(value)] for key, value in tree.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "n_sequence_fields"):  # of torch.max, topk and the like
        return {"named": [kind.__name__, list(kind.__match_args__), [again(item) for item in tree]]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {"named": [kind.__name__, list(tree._fields), [again(item) for item in tree]]}
    keyed, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda value: value is not tree)
    if keyed and keyed[0][0]:
        names = [_plain(path[0]) for path, _ in keyed]
        return {"record": [kind.__name__, names, [again(value) for _, value in keyed]]}
    raise Strange(f"a {kind.__name__}")


def _plain(key: Any) -> str | int:
    """The name or the number that a key of torch's pytrees stands for."""
    for attribute in ("key", "name", "idx"):
        found = getattr(key, attribute, None)
        if isinstance(found, str | int):
            return found
    return str(key)


def build(node: Node, tensors: Sequence[torch.Tensor]) -> Any:
    """The reverse of :func:`describe`."""
    ((kind, held),) = node.items()
    if kind == "tensor":
        return tensors[held]
    return held if kind == "value" else _KINDS[kind](held, tensors)


def _sequence(make: Callable[[Iterable[Any]], Any]) -> Callable[[Any, Sequence[torch.Tensor]], Any]:
    return lambda held, tensors: make(build(item, tensors) for item in held)


def _dict(held: Any, tensors: Sequence[torch.Tensor]) -> Any:
    return {key: build(item, tensors) for key, item in held}


def _named(held: Any, tensors: Sequence[torch.Tensor]) -> Any:
    name, fields, items = held
    return _named_class(name, tuple(fields))(*(build(item, tensors) for item in items))


@functools.cache
def _named_class(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _record(held: Any, tensors: Sequence[torch.Tensor]) -> Any:
    _, names, items = held
    return Record(zip(names, (build(item, tensors) for item in items), strict=True))


_KINDS: dict[str, Callable[[Any, Sequence[torch.Tensor]], Any]] = {
    "tuple": _sequence(tuple),
    "list": _sequence(list),
    "dict": _dict,
    "named": _named,
    "record": _record,
}


def take(node: Node, tree: Any, tensors: list[torch.Tensor]) -> None:
    """Appends the tensors of a tree to a list, in the order of a description.

    Raises:
        Strange: the tree isn't as it is described; the first argument says how.
    """
    ((kind, held),) = node.items()
    if kind == "tensor":
        if not isinstance(tree, torch.Tensor):
            raise Strange(f"{_said(tree)} is given, where there was a tensor")
        tensors.append(tree)
    elif kind == "value":
        if type(tree) is not type(held) or tree != held:
            raise Strange(f"{_said(tree)} is given, where {held!r} is compiled in")
    else:
        items, keys = (held[2], held[1]) if kind in ("named", "record") else (held, range(len(held)))
        if kind == "dict":
            keys, items = [key for key, _ in held], [item for _, item in held]
        for key, item in zip(keys, items, strict=True):
            take(item, _value(kind, list(keys), tree, key), tensors)
        if not keys:
            _value(kind, [], tree, None)


def _value(kind: str, keys: list[Any], tree: Any, key: Any) -> Any:
    """The value of a container under a key; raises Strange unless the container has exactly these keys."""
    if kind in ("tuple", "list"):
        fits = type(tree).__name__ == kind and len(tree) == len(keys)
    elif kind == "named":
        fits = list(getattr(tree, "_fields", ())) == keys
    else:
        fits = (isinstance(tree, dict) and tree.keys() == set(keys)) or (kind == "record" and hasattr(tree, str(key)))
    if not fits:
        raise Strange(f"{_said(tree)} is given, where there was a {kind} of {keys if kind == 'dict' else len(keys)}")
    if key is None:
        return None
    return getattr(tree, key) if kind == "named" or not isinstance(tree, tuple | list | dict) else tree[key]


def _said(tree: Any) -> str:
    if isinstance(tree, bool | int | float | str | None):
        return repr(tree)
    return f"a {type(tree).__name__}" + (f" of {len(tree)}" if isinstance(tree, tuple | list | dict) else "")


def tensors_of(node: Node) -> Iterator[int]:
    """The places of a tree's tensors, in order."""
    ((kind, held),) = node.items()
    if kind == "tensor":
        yield held
    elif kind != "value":
        items = [item for _, item in held] if kind == "dict" else held[2] if kind in ("named", "record") else held
        for item in items:
            yield from tensors_of(item)


@dataclass(frozen=True)
class Tree:
    """What a module returns: its structure in torch's pytrees, and its leaves, each a tensor's place or a value."""

    spec: pytree.TreeSpec
    leaves: list[tuple[bool, Any]]

    @classmethod
    def of(cls, value: Any) -> "Tree":
        """That of a value."""
        leaves, spec = pytree.tree_flatten(value)
        places = itertools.count()
        return cls(spec, [(True, next(places)) if isinstance(one, torch.Tensor) else (False, one) for one in leaves])

    def build(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The value with these tensors in it."""
        return pytree.tree_unflatten(
            [tensors[held] if is_tensor else held for is_tensor, held in self.leaves], self.spec
        )
