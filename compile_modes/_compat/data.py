"""``Tensor.data`` in a model that is traced, where torch.export loses what is written to it.

Checked on torch 2.14.1 and 2.15.0: an assignment ``x.data = value`` leaves no node, and an in-place op on ``x.data``
leaves one on a constant of its own.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compile_modes._compat.readers import TORCH

_replacing = threading.RLock()  # an attribute of a class is everybody's


@contextlib.contextmanager
def data_is_traced(refuse: Callable[[str], Exception]) -> Iterator[None]:
    """In it, ``x.data`` is ``x.detach()`` for code outside of torch, and an assignment to it a ``copy_``.

    Where autograd has saved ``x`` before, a backward pass raises then, which in eager would compute with the new value.

    Args:
        refuse: makes an exception of the reason why a value can't be copied.
    """
    original: Any = torch._C.TensorBase.data
    here = threading.get_ident()

    def traced() -> bool:
        return threading.get_ident() == here and not sys._getframe(2).f_code.co_filename.startswith(TORCH)

    def read(tensor: Tensor) -> Tensor:
        return tensor.detach() if traced() else original.__get__(tensor)

    def write(tensor: Tensor, value: Tensor) -> None:
        if not traced():
            original.__set__(tensor, value)
            return
        if (value.shape, value.dtype, value.device) != (tensor.shape, tensor.dtype, tensor.device):
            before, now = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (tensor, value))
            raise refuse(f"{now} for {before}")
        with torch.no_grad():
            tensor.copy_(value)

    with _replacing:
        Tensor.data = property(read, write)  # type: ignore[assignment]
        try:
            yield
        finally:
            del Tensor.data
