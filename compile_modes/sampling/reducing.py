"""What becomes of the results: all of them, their means and deviations, or what a function makes of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compile_modes import messages

Fold = Callable[[Any, Any], Any]


class Stack:
    """All results, along a new first dimension."""

    def __init__(self) -> None:
        self._chunks: list[list[Any]] = []
        self._spec: Any = None

    def add(self, leaves: Sequence[Any], spec: Any) -> None:
        """Takes the results of some repetitions: flat, tensors of shape (repetitions, ...), and what is no tensor."""
        if self._chunks:
            _check_alike(self._chunks[0], self._spec, leaves, spec)
        self._spec = spec
        self._chunks.append(list(leaves))

    def result(self) -> Any:
        columns = zip(*self._chunks, strict=True)
        joined = [torch.cat(c) if len(c) > 1 and isinstance(c[0], Tensor) else c[0] for c in columns]
        return pytree.tree_unflatten(joined, self._spec)


class Moments:
    """Mean and standard deviation (with n - 1) of each value, without all results in memory.

    Chunks are put together by Chan, Golub, LeVeque: "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979). Small floating-point types are summed in float32; integers and booleans have means in float32.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: list[Any] = []
        self._squares: list[Any] = []
        self._dtypes: list[Any] = []
        self._spec: Any = None

    def add(self, leaves: Sequence[Any], spec: Any) -> None:
        """As :meth:`Stack.add`."""
        if self._count:
            _check_alike(self._mean, self._spec, leaves, spec)
        else:
            self._spec, self._dtypes = spec, [_dtype(leaf) for leaf in leaves]
            self._mean, self._squares = list(leaves), list(leaves)
        added = 0
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            added = len(leaf)
            exact = leaf.to(_exact(leaf))
            mean = exact.mean(0)
            squares = (exact - mean).abs().square().sum(0)
            if self._count:
                total, step = self._count + added, mean - self._mean[i]
                squares = self._squares[i] + squares + step.abs().square() * (self._count * added / total)
                mean = self._mean[i] + step * (added / total)
            self._mean[i], self._squares[i] = mean, squares
        self._count += added

    def result(self) -> tuple[Any, Any]:
        deviation = [s / max(self._count - 1, 1) if isinstance(s, Tensor) else s for s in self._squares]
        roots = [v.sqrt() if isinstance(v, Tensor) else v for v in deviation]
        means = [m.to(d) if isinstance(m, Tensor) else m for m, d in zip(self._mean, self._dtypes, strict=True)]
        real = [d.to_real() if d is not None else None for d in self._dtypes]  # of a complex number, too
        roots = [r.to(d) if isinstance(r, Tensor) else r for r, d in zip(roots, real, strict=True)]
        return pytree.tree_unflatten(means, self._spec), pytree.tree_unflatten(roots, self._spec)


class Folded:
    """What a function makes of one result after another."""

    def __init__(self, fold: Fold) -> None:
        self._fold, self._state = fold, None

    def add(self, leaves: Sequence[Any], spec: Any) -> None:
        """As :meth:`Stack.add`."""
        for repetition in _repetitions(leaves):
            self._state = self._fold(self._state, pytree.tree_unflatten(repetition, spec))

    def result(self) -> Any:
        return self._state


Reduction = Stack | Moments | Folded


def reduction(reduce: Any, n: int) -> Reduction:
    """The reduction that is asked for; raises OptionError for what is none."""
    if reduce is None:
        return Stack()
    if reduce == "mean_std":
        if n < 2:
            raise messages.NO_MOMENTS.error()
        return Moments()
    if not callable(reduce):
        raise messages.NOT_A_REDUCTION.error(reduce=reduce)
    return Folded(reduce)


def _repetitions(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    count = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    for i in range(count):
        yield [leaf[i] if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _dtype(leaf: Any) -> torch.dtype | None:
    if not isinstance(leaf, Tensor):
        return None
    return leaf.dtype if leaf.is_floating_point() or leaf.is_complex() else torch.get_default_dtype()


def _exact(leaf: Tensor) -> torch.dtype:
    if leaf.is_complex():
        return leaf.dtype
    return torch.promote_types(leaf.dtype, torch.float32)


def _check_alike(before: Sequence[Any], spec: Any, now: Sequence[Any], own_spec: Any) -> None:
    """Raises SampleError for results that have other shapes, or what is no tensor and not the same."""
    if spec != own_spec:
        raise messages.NOT_STACKED.error(now=own_spec, before=spec, path="")
    for path, (one, other) in enumerate(zip(before, now, strict=True)):
        tensors = isinstance(one, Tensor), isinstance(other, Tensor)
        if all(tensors):
            shapes = (tuple(t.shape)[-other.dim() + 1 :] if other.dim() > 1 else () for t in (one, other))
            alike = len(set(shapes)) == 1
        else:
            alike = not any(tensors) and (one is other or bool(one == other))
        if not alike:
            now_said, said = (f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v) for v in (other, one))
            raise messages.NOT_STACKED.error(now=now_said, before=said, path=path)
