"""Who has written to weights, of those that say so: optimizers, graphs of this backend, and :func:`invalidate`."""

import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_ROOM = 100_000  # tensors that are remembered; beyond it, all weights count as written
_LONGEST_STEP = 5.0  # seconds; an optimizer that raised doesn't end its step


class Writes:
    """A clock of writes, and the last one to each tensor, by its id; ids that are used again make for false alarms.

    Attributes:
        now: the number of the last write.
    """

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[int, int] = {}
        self._floor = 0
        self._open: dict[int, tuple[float, int, frozenset[int]]] = {}
        self._lock = threading.Lock()

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that these have been written to, whether or not it shows."""
        with self._lock:
            if len(self._last) > _ROOM:
                self._last, self._floor = {}, self.now + 1
            self._last.update(dict.fromkeys(map(id, tensors), self.now + 1))
            self.now += 1  # last: whoever sees the number finds the tensors

    def since(self, then: int, ids: Iterable[int]) -> list[int]:
        """Which of these tensors have been written to after a time, by their positions."""
        if self._floor > then:
            return list(range(len(list(ids))))
        return [index for index, key in enumerate(ids) if self._last.get(key, 0) > then]

    def begin(self, writer: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Says that someone writes to these until :meth:`end`."""
        self._open[id(writer)] = time.monotonic(), threading.get_ident(), frozenset(map(id, tensors))

    def end(self, writer: Any) -> None:
        self._open.pop(id(writer), None)

    def in_progress(self, ids: Iterable[int]) -> bool:
        """Whether another thread is writing to one of these tensors."""
        if not self._open:
            return False
        late, own = time.monotonic() - _LONGEST_STEP, threading.get_ident()
        others = [written for start, thread, written in list(self._open.values()) if start > late and thread != own]
        return any(not written.isdisjoint(ids) for written in others)


WRITES = Writes()
_hooked: list[Any] = []


def listen() -> None:
    """From now on, steps of all optimizers are noted: fused ones leave no trace on the tensors themselves."""
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_step))
        _hooked.append(register_optimizer_step_post_hook(_after_step))


def invalidate(module: nn.Module) -> None:
    """Has graphs that were compiled with ``options={"freeze": ...}`` compute their constants again.

    They notice nearly all writes to parameters and buffers by themselves. Call this after one that ``"auto"`` can't
    see: to a part of a large tensor, through ``.data``, NumPy or other memory that is shared.

    Args:
        module: whose parameters and buffers have been written to, those of its submodules too; compiled or not.
    """
    WRITES.note([*module.parameters(), *module.buffers()])


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():  # compiled steps change version counters
        WRITES.begin(optimizer, _parameters(optimizer))


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        WRITES.note(_parameters(optimizer))
        WRITES.end(optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
