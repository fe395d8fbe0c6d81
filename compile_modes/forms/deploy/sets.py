"""One parameter set of a graph: whether it has been written to, its constants, and what a call of it runs."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from compile_modes.forms.deploy.graphs import Graph
from compile_modes.forms.deploy.snapshot import Snapshot, overlap
from compile_modes.forms.deploy.writes import WRITES

# Calls without a write in between, after which constants are worth computing: a loop that trains and evaluates in turn
# never comes to it.
RESTED = 3
_ATTEMPTS = 100
_PAUSE = 2e-4


class Constants:
    """The constants of one parameter set.

    A reader takes ``_state``, the snapshot and the code over constants that belong to it, in one piece, and needs no
    lock. Whoever changes it holds ``_lock``; others do not wait, but run the stock form.
    """

    def __init__(self, graph: Graph, weights: Sequence[torch.Tensor], *, strict: bool) -> None:
        self._graph, self._strict = graph, strict
        self._lock = threading.Lock()
        self._state: tuple[Snapshot, Callable[..., Any] | None] = Snapshot(weights, strict=strict), None
        self._values: dict[str, torch.Tensor] = {}
        self._pending: set[int] = set()
        self._rested = 0

    @property
    def nbytes(self) -> int:
        """The memory of the constants; of packed ones, what is in them."""
        values = self._values.values()
        return sum(v.numel() * v.element_size() if v.is_mkldnn else v.untyped_storage().nbytes() for v in values)

    def __call__(self, weights: Sequence[torch.Tensor], args: Sequence[Any]) -> Any:
        snapshot, view = self._state
        same = snapshot.same(weights)
        if not same or view is None:
            view = self._settled(weights, args)
        if view is None:
            return self._stock(weights, args)
        try:
            return self._graph.run(view, args)
        except Exception as error:  # a kernel that refuses: if the caller is to blame, the stock form raises too
            result = self._graph.stock(*args)
            self._graph.decline(error)
            return result

    def _settled(self, weights: Sequence[torch.Tensor], args: Sequence[Any]) -> Callable[..., Any] | None:
        """What to run on constants that are those of the weights, if they have rested for long enough."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            snapshot, view = self._state
            if changed := snapshot.changed(weights):
                self._pending |= changed
                self._rested = 0
                self._state = Snapshot(weights, strict=self._strict, before=snapshot), None
                return None
            if view is not None:
                return view
            self._rested += 1
            if self._rested < RESTED or self._graph.declined:
                return None
            if overlap(weights):
                self._graph.decline("weights share memory")
                return None
            if not self._graph.frozen:
                self._graph.freeze(args)
            return self._refreshed(snapshot, weights) if self._graph.frozen else None
        finally:
            self._lock.release()

    def _refreshed(self, snapshot: Snapshot, weights: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
        """Computes the constants again that depend on what has changed; drops them if someone writes meanwhile."""
        if not self._still(snapshot, weights):
            return None
        try:
            values = self._graph.constants(weights, self._values, self._pending)
            view = self._graph.view(values)
        except Exception as error:
            self._graph.decline(error)
            return None
        if not self._still(snapshot, weights):
            return None
        self._values, self._pending = values, set()
        self._state = snapshot, view
        return view

    def _stock(self, weights: Sequence[torch.Tensor], args: Sequence[Any]) -> Any:
        """Runs the stock form, which reads the weights themselves: again, if they were written to meanwhile."""
        result = None
        for _ in range(_ATTEMPTS):
            while WRITES.in_progress(self._state[0].ids):
                time.sleep(_PAUSE)
            snapshot = self._state[0]
            if not snapshot.same(weights):
                snapshot = Snapshot(weights, strict=self._strict, before=snapshot)
            result = self._graph.stock(*args)
            if self._still(snapshot, weights):
                break
        return result

    def _still(self, snapshot: Snapshot, weights: Sequence[torch.Tensor]) -> bool:
        return not WRITES.in_progress(snapshot.ids) and snapshot.same(weights)
