"""What two observations differ in, and the report of all of them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compile_modes import pages
from compile_modes.errors import summary
from compile_modes.exported.observing import BACKWARD, CALL, DREW, Key

# Of compiled code, relative to the largest value of a tensor, but at least to 1.
TOLERANCES = {torch.float64: 1e-7, torch.complex128: 1e-7, torch.float32: 1e-4, torch.complex64: 1e-4}
_PLURALS = {
    "output": "outputs",
    "gradient": "gradients",
    "parameter": "parameters",
    "buffer": "buffers",
    "argument": "arguments",
    "requires_grad": "requires_grad of outputs",
    "random numbers": "states of generators",
}
_REDUCED = 2e-2  # float16, bfloat16 and smaller


@dataclass(frozen=True)
class Difference:
    """One value that differs.

    Attributes:
        what: "output", "gradient", "requires_grad", "parameter", "buffer", "argument", "random numbers", or "call" and
            "backward" where only one of the two raised.
        name: the name of the parameter, buffer or argument, or the place in the outputs.
        size: the largest difference of an element; infinite where there is nothing to subtract.
        text: what the difference is.
        modes: the mode vector.
        call: the number of the call in that vector, from 1; 0 before any.
    """

    what: str
    name: str
    size: float
    text: str
    modes: Mapping[str, bool]
    call: int

    @property
    def where(self) -> str:
        """What differs, its name and the modes."""
        return f"{self.what} {self.name!r}".removesuffix(" ''") + f", {self.when}"

    @property
    def when(self) -> str:
        """The call and the mode vector."""
        return f"call {self.call} of {said(self.modes)}" if self.call else "before any call"


@dataclass
class VerifyReport:
    """What :func:`compile_modes.verify` has compared, and found.

    Attributes:
        vectors: how many mode vectors were compared.
        steps: calls for each.
        tolerance: what counts as equal, in words.
        compared: how many comparisons of each kind were made.
        differing: how many of them differ beyond the tolerance.
        first: the first of those.
        largest: the largest difference of a value, within the tolerance or not; None if all are equal bit for bit.
        left_out: mode vectors that were not compared, or not to the end, and why.
    """

    steps: int
    tolerance: str
    vectors: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    first: Difference | None = None
    largest: Difference | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs beyond the tolerance."""
        return self.first is None

    def __str__(self) -> str:
        total = sum(self.compared.values())
        kinds = ", ".join(f"{count} {_PLURALS.get(kind, kind)}" for kind, count in self.compared.items())
        head = "equal" if self.equal else f"different in {self.differing} of {total} comparisons"
        lines = [f"{head}: {self.vectors} mode vectors, calls in each: {self.steps}", f"  compared: {kinds}"]
        lines.append(f"  tolerance: {self.tolerance}")
        if self.first is not None:
            lines.append(f"  first difference: {self.first.where}: {self.first.text}")
        if self.largest is None:
            lines.append("  largest difference: none, all values are equal bit for bit")
        else:
            lines.append(f"  largest difference: {self.largest.where}: {self.largest.text}")
        for reason, count in Counter(self.left_out).items():
            lines.append(f"  left out: {count} mode vectors: {reason}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return pages.report(str(self))

    def compare(
        self, eager: Mapping[Key, Any], ours: Mapping[Key, Any], modes: Mapping[str, bool], call: int, tolerance: Any
    ) -> None:
        """Adds the comparison of two observations."""
        for key in _comparable(eager, ours):
            what, name = key
            size, text, equal = difference(eager.get(key), ours.get(key), tolerance)
            self.compared[what] += 1
            found = Difference(what, name, size, text, modes, call)
            if size > 0 and (self.largest is None or size > self.largest.size):
                self.largest = found
            if not equal:
                self.differing += 1
                self.first = self.first or found


class Tolerance:
    """How far values may be apart.

    Args:
        atol: the largest difference of floating-point elements; None for that of ``dtypes``.
        dtypes: whether it is that of compiled code, by dtype; otherwise none at all.
    """

    def __init__(self, atol: float | None, dtypes: bool) -> None:
        self._atol, self._dtypes = atol, dtypes

    def __str__(self) -> str:
        if self._atol is not None:
            return f"{self._atol:g}, integers exact"
        if not self._dtypes:
            return "none"
        return "relative to the largest element, or 1: 1e-07 for float64, 0.0001 for float32, 0.02 for less"

    def of(self, expected: Tensor) -> float:
        """For values that should be these."""
        if not (expected.is_floating_point() or expected.is_complex()):
            return 0.0
        if self._atol is not None or not self._dtypes:
            return self._atol or 0.0
        largest = expected.abs().double().nan_to_num(0.0, 0.0, 0.0).max().item()
        return TOLERANCES.get(expected.dtype, _REDUCED) * max(1.0, largest)


def difference(eager: Any, ours: Any, tolerance: Tolerance) -> tuple[float, str, bool]:
    """How large the difference of two values is, what it is in words, and whether they count as equal."""
    if not isinstance(eager, Tensor) or not isinstance(ours, Tensor):
        same = _same(eager, ours)
        return (0.0, "", True) if same else (math.inf, f"{shown(ours)}, which is {shown(eager)} in eager", False)
    if (eager.shape, eager.dtype, eager.device) != (ours.shape, ours.dtype, ours.device):
        return math.inf, f"{shown(ours)}, which is {shown(eager)} in eager", False
    if eager is ours or torch.equal(eager, ours):
        return 0.0, "", True
    if eager.dtype is torch.uint8:
        return math.inf, "another state", False  # of a generator, mostly, which has no size
    size = gaps(eager, ours).max().item()
    return size, f"off by {size:.3g}", size <= tolerance.of(eager)


def gaps(a: Tensor, b: Tensor) -> Tensor:
    """How far the elements of two tensors of one shape are apart, in float64.

    NaNs are not apart from NaNs; infinitely far is what only one of them has as a NaN or an infinity.
    """
    a, b = (t.to(torch.complex128) if t.is_complex() else t.double() for t in (a, b))
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)


def _comparable(eager: Mapping[Key, Any], ours: Mapping[Key, Any]) -> list[Key]:
    """What to compare: all that eager has shown, and what it hasn't although it could have."""
    if eager[CALL] is not None or ours[CALL] is not None:
        return [CALL]
    keys = [key for key in eager if key not in (CALL, BACKWARD, DREW)]
    keys += [key for key in ours if key[0] in ("output", "gradient") and key not in eager]
    if eager.get(BACKWARD) is not None:  # then ours need not have any
        return [key for key in keys if key[0] != "gradient"]
    return [BACKWARD] if ours.get(BACKWARD) is not None else keys


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    return a is b or bool(a == b)


def shown(value: Any) -> str:
    """A value as a report shows it: of a tensor, dtype, shape and device."""
    if value is None:
        return "none"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, Exception):
        return summary(value)
    return str(value)


def said(modes: Mapping[str, bool], most: int = 5) -> str:
    """A mode vector in words: the mode of the root, and who has another one than the module around it."""
    apart: dict[bool, list[str]] = {True: [], False: []}
    for name, mode in modes.items():
        if name and mode is not within(modes, name.rpartition(".")[0]):
            apart[mode].append(repr(name))
    text = "train" if modes[""] else "eval"
    for mode, names in apart.items():
        if names:
            more = f" and {len(names) - most} more" if names[most:] else ""
            text += f"; {'train' if mode else 'eval'}: {', '.join(names[:most])}{more}"
    return text


def within(modes: Mapping[str, bool], name: str) -> bool:
    """The mode that a vector has for a module, or for the nearest one around it that it names."""
    while name not in modes:
        name = name.rpartition(".")[0]
    return modes[name]
