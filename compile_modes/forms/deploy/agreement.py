"""Whether two results are one, up to rounding."""

from typing import Any

import torch

_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}


def disagreement(expected: Any, given: Any, *, tolerance: float | None) -> str:
    """In which way a result isn't what it should be; empty if it is.

    Args:
        expected: a tensor, or anything else that a graph returns.
        given: the same.
        tolerance: the largest norm of the difference, relative to that of the expected; None: as the dtype has it.
    """
    if not isinstance(expected, torch.Tensor) or not isinstance(given, torch.Tensor):
        return "" if expected == given else f"{given} instead of {expected}"
    for what in ("shape", "dtype", "layout", "device"):
        if getattr(expected, what) != getattr(given, what):
            return f"{what} {getattr(given, what)} instead of {getattr(expected, what)}"
    if expected.layout != torch.strided:
        return ""  # packed, in a way that only the kernel knows
    if expected.stride() != given.stride():
        return f"strides {given.stride()} instead of {expected.stride()}"
    if torch.equal(expected, given) or not expected.is_floating_point():
        return "" if torch.equal(expected, given) else "another value"
    tolerance = _TOLERANCE.get(expected.dtype, 1e-3) if tolerance is None else tolerance
    one, other = expected.double(), given.double()
    known = one.isfinite()
    if not torch.equal(one[~known].nan_to_num(0.5), other[~known].nan_to_num(0.5)):
        return "another value"
    error, size = (one - other)[known].norm().item(), one[known].norm().item()
    return "" if error <= tolerance * size else f"a relative error of {error / size if size else error:.1e}"
