"""What the parameters, buffers and constants of two programs differ in."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from compile_modes import _compat
from compile_modes.errors import summary
from compile_modes.exported.comparing import gaps, shown
from compile_modes.exported.differing.report import WeightDifference
from compile_modes.graph.owners import join
from compile_modes.graph.view import View

_PIECE = 1 << 22  # elements that are compared at a time, for each takes some 40 bytes meanwhile


def weights_of(obj: Any, views: Sequence[View]) -> dict[str, Tensor]:
    """All tensors of a program, by path: parameters, buffers, and constants that its graphs read.

    Args:
        obj: the program or module, and ``views`` its graphs.
    """
    held: dict[str, Tensor] = {}
    for module in (*([obj] if isinstance(obj, nn.Module) else []), *(view.root for view in views)):
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                held.setdefault(name, tensor)
    for view in views:
        for body in view.bodies:
            for node in body.graph.find_nodes(op="get_attr"):
                if isinstance(value := view.held[node], Tensor):
                    held.setdefault(view.state[node] or join(body.path, str(node.target)), value)
    if isinstance(obj, ExportedProgram):  # a module of it lacks the buffers that only train reads
        for name, tensor in obj.state_dict.items():
            held.setdefault(name, tensor)
    return held


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[list[WeightDifference], dict[str, str], int]:
    """What two sets of weights differ in, whose values couldn't be compared and why, and how many pairs there are."""
    found, left_out = [], {}
    for name, tensor in a.items():
        if name not in b:
            found.append(WeightDifference("lost", name, _kind(tensor), None))
            continue
        largest, elements = None, 0
        try:
            if tensor.shape == b[name].shape:
                largest, elements = _apart(tensor.detach(), b[name].detach())
        except Exception as error:  # tensors of other layouts and subclasses raise whatever they lack
            left_out[name] = summary(error)
        kinds = _kind(tensor), _kind(b[name])
        if elements or kinds[0] != kinds[1]:
            counted = elements if largest is not None else None
            found.append(WeightDifference("changed", name, *kinds, largest, counted))
    found += [WeightDifference("added", name, None, _kind(b[name])) for name in b if name not in a]
    return found, left_out, len(a.keys() & b.keys())


def _kind(tensor: Tensor) -> str:
    """What a tensor is: dtype, shape and device; its type if it has no shape, nested or not initialised yet."""
    with contextlib.suppress(RuntimeError):
        return shown(tensor)
    return type(tensor).__name__


def _apart(a: Tensor, b: Tensor) -> tuple[float, int]:
    """The largest difference of two tensors of one shape, and how many elements differ."""
    if a is b or (a.layout is b.layout is torch.strided and _same_memory(a, b)):
        return 0.0, 0
    if any(t.is_meta or isinstance(t, _compat.FakeTensor) for t in (a, b)):
        raise ValueError("it has no values")
    largest, count = 0.0, 0
    for one, other in _pieces(a, b):
        if one.dtype == other.dtype and torch.equal(one, other):
            continue
        apart = gaps(one, other)
        unequal = apart > 0
        whole = not (one.is_floating_point() or one.is_complex() or other.is_floating_point() or other.is_complex())
        if whole and one.dtype == other.dtype:  # float64 holds no integers beyond 2**53
            unequal = one != other
            apart = torch.where(unequal, apart.clamp(min=1.0), 0.0)
        count += int(unequal.sum())
        largest = max(largest, apart.max().item())
    return largest, count


def _same_memory(a: Tensor, b: Tensor) -> bool:
    with contextlib.suppress(RuntimeError):  # wrappers have no memory of their own
        same = a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device
        return same and a.data_ptr() == b.data_ptr() != 0
    return False


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = [t.resolve_conj().resolve_neg().reshape(-1) for t in (a, b)]
    for start in range(0, a.numel(), _PIECE):
        one, other = (t[start : start + _PIECE].cpu() for t in flat)
        yield one, other
