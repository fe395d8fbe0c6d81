"""Buffers that a model assigns (``self.std = var.sqrt()``), whose new values torch.export loses.

Non-strict export keeps an assignment at the root alone (2.11 to 2.15): in a submodule, the call computes with the new
value and the next call reads the old one. Here the model works on copies of such buffers while it is traced, and at the
end of its ``forward`` the values that it leaves are written into the buffers themselves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from compile_modes import messages
from compile_modes.graph.owners import join

_T = TypeVar("_T")
_Buffers = dict[tuple[str, str], Any]


def keeping_assignments(model: nn.Module, export: Callable[[], _T]) -> _T:
    """Exports a model so that buffers that it assigns are written by the program.

    Args:
        model: the model, in the mode that is exported.
        export: traces ``model(...)``. Called a second time if buffers are found to be assigned.

    Raises:
        ExportError: what is assigned can't be written into the buffer: it has another shape, dtype or device, carries
            gradients on into later calls, or the buffer has several names.
    """
    tracing = _Forward(model, set())
    program = tracing.run(export)
    if tracing.assigned:
        tracing = _Forward(model, tracing.assigned)
        program = tracing.run(export)
    return program


class _Forward:
    """One trace of the root's ``forward``.

    Attributes:
        assigned: the buffers that have other values behind it, by path of the module and name.
    """

    def __init__(self, model: nn.Module, known: set[tuple[str, str]]) -> None:
        self.model, self.known = model, known
        self.assigned: set[tuple[str, str]] = set()
        self._before: _Buffers = {}
        self._given: _Buffers = {}

    def run(self, export: Callable[[], _T]) -> _T:
        found = {id(m): (m, dict(m._buffers)) for m in self.model.modules()}
        entering = self.model.register_forward_pre_hook(self._enter, prepend=True)
        leaving = self.model.register_forward_hook(self._leave)
        try:
            return export()
        finally:
            entering.remove()
            leaving.remove()
            for module, buffers in found.values():  # what was assigned stands for a value that there was none of
                module._buffers.clear()
                module._buffers.update(buffers)

    def _enter(self, model: nn.Module, *_: Any) -> None:
        self.assigned = set()
        self._before = _buffers(model)
        for place in self.known:
            # What reads the buffer, or saves it for backward, must not see it change at the end of this very call.
            model.get_submodule(place[0])._buffers[place[1]] = self._before[place].clone()
        self._given = _buffers(model)

    def _leave(self, model: nn.Module, *_: Any) -> None:
        after = _buffers(model)
        for place in after.keys() - self._given.keys():
            raise messages.ASSIGNED.error(why="a tensor where there was none", where=f"buffer {join(*place)!r}")
        for place, given in self._given.items():
            now, path = after.get(place), join(*place)
            if now is not given:
                self.assigned.add(place)
                self._check(path, now, self._before[place])
            if place in self.known:
                self._before[place].copy_(now)
                model.get_submodule(place[0])._buffers[place[1]] = self._before[place]

    def _check(self, path: str, now: Any, before: Any) -> None:
        why = ""
        if not isinstance(now, torch.Tensor) or not isinstance(before, torch.Tensor):
            why = f"{type(now).__name__} in the place of {type(before).__name__}"
        elif (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
            why = f"{now.dtype} of shape {tuple(now.shape)} for {before.dtype} of shape {tuple(before.shape)}"
        elif now.requires_grad:
            why = "a value that carries gradients, which eager would follow into earlier calls"
        elif sum(other is before for other in self._before.values()) > 1:
            why = "and it has other names, under which eager keeps the old value"
        if why:
            raise messages.ASSIGNED.error(why=why, where=f"buffer {path!r}")


def _buffers(model: nn.Module) -> _Buffers:
    return {(path, name): b for path, m in model.named_modules() for name, b in m._buffers.items() if b is not None}
