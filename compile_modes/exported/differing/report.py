"""What two programs differ in, as data, text and HTML."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compile_modes import console, pages
from compile_modes.pages.drawing import counted, shown

ONLY_ONE = ("lost", "added")


@dataclass(frozen=True)
class SiteDifference:
    """A site that differs, or that only one of two programs has.

    Attributes:
        what: "changed", "lost" (only the first has it) or "added" (only the second has it).
        program: "train" or "eval", of modules with two programs; None otherwise.
        owner: the path of the submodule that it belongs to, in the first program if that has it.
        op: its op, likewise.
        changes: what differs, each with the value before and the value after: ``"mode"`` ("train", "eval" or None),
            ``"held by"`` (see :func:`compile_modes.explain`), ``"inverted"``, ``"op"``, ``"owner"``, and the names of
            literals. For a site that only one has, what it is there: its mode and its literals, with None on the other
            side.
    """

    what: str
    program: str | None
    owner: str
    op: str
    changes: Mapping[str, tuple[Any, Any]]

    @property
    def text(self) -> str:
        """What differs, in words."""
        if self.what in ONLY_ONE:
            side = ONLY_ONE.index(self.what)
            return ", ".join(f"{name}={shown(pair[side])}" for name, pair in self.changes.items())
        return ", ".join(f"{name}: {shown(a)} -> {shown(b)}" for name, (a, b) in self.changes.items())


@dataclass(frozen=True)
class WeightDifference:
    """A parameter, buffer or constant that differs, or that only one of two programs has.

    Attributes:
        what: "changed", "lost" (only the first has it) or "added" (only the second has it).
        name: its path.
        before, after: dtype, shape and device on each side; None where there is none.
        largest: the largest difference of an element, infinite where a NaN or an infinity stands on one side only; None
            where shapes differ, or one is missing.
        elements: how many elements differ; None likewise.
    """

    what: str
    name: str
    before: str | None
    after: str | None
    largest: float | None = None
    elements: int | None = None

    @property
    def text(self) -> str:
        """What differs, in words."""
        if self.what in ONLY_ONE:
            return self.before or self.after or ""
        parts = [f"{self.before} -> {self.after}"] if self.before != self.after else []
        if self.elements:
            parts.append(f"off by up to {self.largest:.3g} in {counted(self.elements, 'elements')}")
        return ", ".join(parts)


@dataclass(frozen=True)
class DiffReport:
    """What :func:`compile_modes.diff` has found. False if nothing differs; its text is a table.

    Attributes:
        names: what the two are called: the types of the objects, or the names of files.
        sites: the sites that differ, in the order of the first program; then those that only the second has.
        weights: the parameters, buffers and constants that differ, likewise.
        programs: what differs in how many programs there are, or in what a pair of programs differs in; or empty.
        compared: how many pairs of "sites" and of "weights" were compared.
        left_out: weights whose values could not be compared, with the reason.
    """

    names: tuple[str, str]
    sites: tuple[SiteDifference, ...]
    weights: tuple[WeightDifference, ...]
    programs: str
    compared: Mapping[str, int]
    left_out: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.sites or self.weights or self.programs)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many sites and weights have changed, are lost, or were added."""
        kinds: dict[str, tuple[Any, ...]] = {"sites": self.sites, "weights": self.weights}
        found = {kind: Counter(item.what for item in items) for kind, items in kinds.items()}
        return {kind: {what: count[what] for what in ("changed", *ONLY_ONE)} for kind, count in found.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as data that JSON can hold; infinities and NaNs are strings."""
        sites = [
            {**vars(site), "changes": {name: [plain(a), plain(b)] for name, (a, b) in site.changes.items()}}
            for site in self.sites
        ]
        weights = [{**vars(weight), "largest": plain(weight.largest)} for weight in self.weights]
        return {
            "names": list(self.names), "differ": bool(self), "counts": self.counts(), "programs": self.programs,
            "sites": sites, "weights": weights, "compared": dict(self.compared), "left_out": dict(self.left_out),
        }  # fmt: skip

    def __str__(self) -> str:
        head = f"{self.names[0]} -> {self.names[1]}"
        said = f"{counted(self.compared['sites'], 'pairs')} of sites and {self.compared['weights']} of weights"
        parts = [f"{head}\n{said}: {_summed(self.counts()) if self else 'nothing differs'}"]
        if self.programs:
            parts.append(self.programs)
        if self.sites:
            two = any(site.program for site in self.sites)
            rows = [(s.what, *[s.program or ""] * two, s.op, s.owner or "(root)", s.text) for s in self.sites]
            parts.append(console.table(("sites", *["program"] * two, "op", "owner", "what differs"), rows))
        if self.weights:
            parts.append(console.table(("weights", "name", "what differs"), [_row(w) for w in self.weights]))
        if self.left_out:
            parts.append("\n".join(f"not compared: {name}: {why}" for name, why in self.left_out.items()))
        return "\n\n".join(parts)

    def html(self) -> str:
        """The report as a page of its own, which needs no network."""
        return pages.document(self._title, pages.difference(self.to_json()))

    def _repr_html_(self) -> str:
        return pages.fragment(pages.difference(self.to_json()), self._title)

    @property
    def _title(self) -> str:
        return " → ".join(self.names)


def _row(weight: WeightDifference) -> tuple[str, str, str]:
    return weight.what, weight.name, weight.text


def _summed(counts: Mapping[str, Mapping[str, int]]) -> str:
    found = [f"{counted(n, kind)} {what}" for kind, by_what in counts.items() for what, n in by_what.items() if n]
    return ", ".join(found) or "the programs differ"


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
