"""A compiled mode: which tensors it was given, and how it is called for results and for gradients."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes._compat.aoti import Library
from compile_modes.package.signature import Signature
from compile_modes.package.structure import Node, build

Place = tuple[Any, ...]  # where a tensor lies, and how
Slot = tuple[dict[str, Any], str]  # the dict that holds a tensor of a module, and the name in it


def place(tensor: torch.Tensor) -> Place:
    """What a library takes for granted of a tensor that it was given."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _said(of: Place) -> str:
    _, shape, stride, dtype, device = of
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} of strides {list(stride)} on {device}"


@dataclass
class State:
    """The parameters and buffers of a module, found anew at each call, for they may be replaced.

    Attributes:
        slots: where each of them is held, by name.
        made: how each was when the package was loaded.
        ties: names that are one tensor, by the first.
    """

    slots: dict[str, Slot]
    made: dict[str, Place]
    ties: dict[str, list[str]]

    def get(self, name: str) -> torch.Tensor:
        """A parameter or buffer as it is now."""
        held, leaf = self.slots[name]
        tensor: torch.Tensor | None = held.get(leaf)
        if tensor is None:
            raise messages.WEIGHT_GONE.error(name=name)
        return tensor

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Raises PackageError for a tensor that a library can't take in the place of that of before."""
        now, wanted = place(tensor), self.made[name]
        if now[1:] != wanted[1:] or type(tensor.data) is not torch.Tensor:
            raise messages.REPLACED.error(now=_said(now), wanted=_said(wanted), name=name)

    def check_ties(self) -> None:
        """Raises PackageError if what was one tensor isn't any more."""
        for first, others in self.ties.items():
            for other in others:
                if self.get(other).data_ptr() != self.get(first).data_ptr():
                    raise messages.UNTIED.error(name=other, other=first)


@dataclass
class Mode:
    """One mode of a package.

    Attributes:
        name: what it is called.
        library: its code.
        state: the module's weights.
        constants: what the library is given beside them.
        signature, outputs: what it takes, and the structure of what it returns.
        results: how many tensors that is.
        loss: whether the loss comes before them, and gradients after them.
        gradients: the parameters that these are for.
    """

    name: str
    library: Library
    state: State
    constants: dict[str, torch.Tensor]
    signature: Signature
    outputs: Node
    results: int
    loss: bool
    gradients: list[str]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _names: list[str] = field(default_factory=list)
    _shared: list[Place] = field(default_factory=list)
    _kept: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = [name for name in self.library.constants() if name not in self.constants]

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Calls the library on the weights as they are now, one call at a time.

        Raises:
            PackageError: a weight was replaced by one that it can't take.
        """
        with self._lock, torch.no_grad():
            held = [self.state.get(name) for name in self._names]
            places = [place(tensor) for tensor in held]
            if places != self._shared:
                self._share(held, places)
            return self.library.run(tensors)

    def _share(self, held: list[torch.Tensor], places: list[Place]) -> None:
        for name, tensor in zip(self._names, held, strict=True):
            self.state.check(name, tensor)
        kept = [tensor.detach() for tensor in held]
        self.library.share({**dict(zip(self._names, kept, strict=True)), **self.constants})
        self._kept, self._shared = kept, places

    def evaluated(self, tensors: list[torch.Tensor]) -> Any:
        """What the module returns."""
        return build(self.outputs, _apart(self.run(tensors), tensors))

    def trained(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """The loss, which takes gradients back to the parameters, and what the module returns, which doesn't."""
        parameters = [self.state.get(name) for name in self.gradients]
        loss, *results = _Step.apply(self, tensors, *parameters)
        return loss, build(self.outputs, results)


class _Step(torch.autograd.Function):
    """Forward and backward in one go; gradients wait for ``backward()``."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, tensors: list[torch.Tensor], *parameters: torch.Tensor) -> Any:
        loss, *rest = mode.run(tensors)
        results, gradients = _apart(rest[: mode.results], [*tensors, loss]), rest[mode.results :]
        wanted = zip(_apart(gradients, [*tensors, loss, *results]), ctx.needs_input_grad[2:], strict=True)
        ctx.gradients = [gradient if asked else None for gradient, asked in wanted]
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)
        return (loss, *results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor | None, *ignored: Any) -> Any:
        if ctx.gradients is None:
            raise messages.BACKWARD_TWICE.error()
        gradients, ctx.gradients = ctx.gradients, None
        if scale is None:
            return (None, None, *(None for _ in gradients))
        if not (scale.device.type == "cpu" and scale.item() == 1):
            gradients = [None if gradient is None else gradient * scale for gradient in gradients]
        return (None, None, *gradients)


def _apart(given: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results in memory of their own, for callers write into them, and optimizers into gradients.

    A library returns one tensor for several equal ones (gradients of a sum, a loss that is an output too), and an
    argument where that is the result, or a clone of it.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in others}
    found = []
    for tensor in given:
        at = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone() if at in seen else tensor)
        seen.add(at)
    return found


def tied(state: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of one tensor by the first of them, where there are several."""
    groups: dict[int, list[str]] = {}
    for entry in state:
        groups.setdefault(entry["tensor"], []).append(entry["name"])
    return {names[0]: names[1:] for names in groups.values() if len(names) > 1}


def slots(module: nn.Module) -> dict[str, Slot]:
    """Where the parameters and buffers of a module are held, by all of their names."""
    found: dict[str, Slot] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        holders: tuple[dict[str, Any], ...] = (submodule._parameters, submodule._buffers)
        for held in holders:
            found |= {f"{path}.{leaf}" if path else leaf: (held, leaf) for leaf in held}
    return found
