"""The state of a module and of the random generators, to be put back as it was."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class Snapshot:
    """Copies of what a call of a module may change, and the way back; identity counts as well as values.

    Args:
        module: whose parameters, buffers, ``.grad`` and flags are kept.
        others: a pytree; its tensors are kept too.
    """

    def __init__(self, module: nn.Module, others: Any = None) -> None:
        modules = list(module.modules())
        self._flags = [(m, m.training) for m in modules]
        self._names: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (names, dict(names)) for m in modules for names in (m._buffers, m._parameters)
        ]
        held = [t for names, _ in self._names for t in names.values() if t is not None]
        held += [t for t in pytree.tree_leaves(others) if isinstance(t, torch.Tensor)]
        unique = {id(t): t for t in held}.values()
        self._grads = [(t, t.grad) for t in unique if t.is_leaf]
        kept = {id(t): t for t in (*unique, *(g for _, g in self._grads if g is not None))}.values()
        with torch.no_grad():
            self._values = [(t, t.detach().clone()) for t in kept]
        self._generators = list(generators())

    def restore(self) -> None:
        """Puts everything back; may be called more than once."""
        for names, before in self._names:
            if [*map(id, names.values())] != [*map(id, before.values())] or [*names] != [*before]:
                names.clear()
                names.update(before)
        for tensor, value in self._values:
            _put_back(tensor, value)
        for tensor, grad in self._grads:
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
        for module, training in self._flags:
            module.training = training
        for set_state, state in self._generators:
            set_state(state)


def _put_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    # An inference tensor may be written in inference mode only, a saved one not at all unless it has changed.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.grad_fn is not None and tensor._base is None:
            tensor.detach_()  # a buffer that was written with a value that carries gradients
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)  # observers of quantization grow on their first call
        if not torch.equal(tensor, value):
            tensor.copy_(value)


def generators() -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """The state of each global generator, with the function that sets it."""
    yield torch.set_rng_state, torch.get_rng_state()
    if torch.cuda.is_initialized():
        yield torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()
    for _, set_state, state in foreign_generators():
        yield set_state, state


@contextlib.contextmanager
def keeping_generators() -> Iterator[None]:
    """Puts all generators back afterwards."""
    before = list(generators())
    try:
        yield
    finally:
        for set_state, state in before:
            set_state(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed on, in all generators, which are put back afterwards."""
    with keeping_generators():
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        yield


def foreign_generators() -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """The generators that are not torch's: what each is called, what sets its state, and the state."""
    yield "Python's random", random.setstate, random.getstate()
    if (numpy := sys.modules.get("numpy")) is not None:
        yield "NumPy", numpy.random.set_state, numpy.random.get_state()
