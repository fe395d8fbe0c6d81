"""Calls in a model that ``torch.export`` runs while it traces, and of which nothing is left in the program.

Checked on torch 2.14.1 and 2.15.0.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compile_modes._compat.readers import TORCH

_CALLS: tuple[tuple[Any, str, str], ...] = (
    (torch.Tensor, "register_hook", "hooks on gradients (Tensor.register_hook)"),
    (torch, "manual_seed", "torch.manual_seed()"),
    (torch.random, "manual_seed", "torch.manual_seed()"),
)
_replacing = threading.RLock()  # these are everybody's


@contextlib.contextmanager
def nothing_is_lost(refuse: Callable[[str], Exception]) -> Iterator[None]:
    """In it, code outside of torch can't make such calls.

    Args:
        refuse: makes an exception of what would be lost.
    """
    here = threading.get_ident()

    def refusing(original: Any, what: str) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here and not sys._getframe(1).f_code.co_filename.startswith(TORCH):
                raise refuse(what)
            return original(*args, **kwargs)

        return call

    with _replacing:
        originals = [(holder, name, getattr(holder, name)) for holder, name, _ in _CALLS]
        for (holder, name, what), (_, _, original) in zip(_CALLS, originals, strict=True):
            setattr(holder, name, refusing(original, what))
        try:
            yield
        finally:
            for holder, name, original in originals:
                setattr(holder, name, original)
