"""Which site of one program is which of another, and what the two differ in."""

import difflib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from compile_modes.exported.differing.report import SiteDifference
from compile_modes.exported.literals import Home, home_of
from compile_modes.graph.explain import surveyed
from compile_modes.graph.finding import find
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View

_GIVEN = "given"  # for a tensor, and for a number that the graph computes
Pair = tuple["Described | None", "Described | None"]


@dataclass(frozen=True)
class Described:
    """A site, and what of it is compared.

    Attributes:
        site: the site.
        home: its family, and whose it is: of a norm, the module that holds its statistics.
        facts: its op, owner, mode, what holds the mode, and its literals, by name.
        literals: the names of those facts that are literals.
    """

    site: Site
    home: Home
    facts: dict[str, Any]
    literals: tuple[str, ...]


def described(view: View) -> list[Described]:
    """The sites of a program, in graph order."""
    found = find(view)
    result = []
    for site, said in zip(found, surveyed(view, found)["sites"], strict=True):
        literals = {**said["literals"], **_arguments(site)}
        facts = {"op": said["op"], "owner": said["owner"], "mode": said["mode"], "held by": said["held_by"]}
        facts |= {"inverted": said["inverted"], **literals}
        result.append(Described(site, home_of(site), facts, tuple(literals)))
    return result


def differing(a: Sequence[Described], b: Sequence[Described], program: str | None) -> tuple[list[SiteDifference], int]:
    """What two programs' sites differ in, in the order of the first, and how many pairs were compared."""
    pairs = _paired(a, b)
    place = {id(item): number for number, item in enumerate([*a, *b])}
    pairs.sort(key=lambda pair: place[id(pair[0] or pair[1])])
    found = [_difference(one, other, program) for one, other in pairs]
    return [d for d in found if d is not None], sum(one is not None and other is not None for one, other in pairs)


def _difference(a: Described | None, b: Described | None, program: str | None) -> SiteDifference | None:
    one = a or b
    assert one is not None
    owner, op = one.facts["owner"], one.facts["op"]
    if a is None or b is None:
        names = ("mode", "held by", *one.literals)
        told = {name: one.facts[name] for name in names if not str(one.facts[name]).endswith(_GIVEN)}
        changes = {name: (value, None) if b is None else (None, value) for name, value in told.items()}
        return SiteDifference("lost" if b is None else "added", program, owner, op, changes)
    either = dict.fromkeys([*a.facts, *b.facts])
    both = {name: (a.facts.get(name), b.facts.get(name)) for name in either}
    changes = {name: pair for name, pair in both.items() if not _same(*pair)}
    return SiteDifference("changed", program, owner, op, changes) if changes else None


def _same(a: Any, b: Any) -> bool:
    """Whether two literals are equal; 1 and True are not, NaN and NaN are."""
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _paired(a: Sequence[Described], b: Sequence[Described]) -> list[Pair]:
    """Pairs the sites of each home in order; then, of a family, those that have lost their homes."""
    homes: dict[Home, tuple[list[Described], list[Described]]] = defaultdict(lambda: ([], []))
    for side, items in enumerate((a, b)):
        for item in items:
            homes[item.home][side].append(item)
    pairs: list[Pair] = []
    alone: dict[str, tuple[list[Described], list[Described]]] = defaultdict(lambda: ([], []))
    for one, other in homes.values():
        for first, second in _aligned(one, other):
            if first is not None and second is not None:
                pairs.append((first, second))
            elif (left := first or second) is not None:
                alone[left.site.op.family][first is None].append(left)
    for one, other in alone.values():
        moved = len(one) == len(other)  # a tool has put its own in the place of each
        pairs += zip(one, other, strict=True) if moved else [*((x, None) for x in one), *((None, x) for x in other)]
    return pairs


def _aligned(a: list[Described], b: list[Described]) -> Iterator[Pair]:
    """Pairs sites of one home in order; if there are not as many on both sides, what was lost or added is left over."""
    if len(a) == len(b):
        yield from zip(a, b, strict=True)
        return
    tokens = [[(x.facts["op"], *(str(x.facts[name]) for name in x.literals)) for x in items] for items in (a, b)]
    start = 0
    while start < min(len(a), len(b)) and tokens[0][start] == tokens[1][start]:
        start += 1  # what is alike in front needs no search, which takes the square of it
    yield from zip(a[:start], b[:start], strict=True)
    matcher = difflib.SequenceMatcher(None, tokens[0][start:], tokens[1][start:], autojunk=False)
    for _, low, high, lower, upper in matcher.get_opcodes():
        one, other = a[start + low : start + high], b[start + lower : start + upper]
        shared = min(len(one), len(other))
        yield from zip(one[:shared], other[:shared], strict=True)
        yield from ((x, None) for x in one[shared:])
        yield from ((None, x) for x in other[shared:])


def _arguments(site: Site) -> dict[str, Any]:
    """The arguments of a site's op that neither are its mode nor shown as its literals, by the names in its schema."""
    op = site.op
    if not isinstance(op.overload, OpOverload) or site.node.target is not op.overload:
        return {}
    known = {op.flag, op.p, *op.shown}
    return {name: _told(site.read(name)) for name in op.arguments if name not in known}


def _told(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _GIVEN
    if isinstance(value, list | tuple):
        return f"{len(value)} {_GIVEN}" if any(isinstance(v, fx.Node) for v in value) else str(list(value))
    return value if isinstance(value, float | int | str | None) else str(value)
