"""What weights looked like at one time: enough to see nearly every write to them, or, if asked for, every one."""

import ctypes
import itertools
import operator
from collections.abc import Callable, Sequence

import torch

from compile_modes.forms.deploy.writes import WRITES

_SMALL = 8192  # bytes
_SMALL_VECTOR = 2**18  # bytes; the statistics of batch norms, which eager kernels write to without a trace
_SAMPLE = 64  # bytes, at three places of larger tensors
_pointers: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr
_versions = operator.attrgetter("_version")


class Snapshot:
    """The state of tensors, and their storages, which are held on to: an address is not given to others meanwhile.

    Memory is read only where a tensor still has its address. Storages stay free to be resized, shared or moved.

    Args:
        weights: the tensors; which ones they are stays what it is.
        strict: whether to see every write.
        before: an earlier snapshot of the same tensors, of which a new one is made faster.

    Attributes:
        ids: of the tensors.
    """

    def __init__(self, weights: Sequence[torch.Tensor], *, strict: bool, before: "Snapshot | None" = None) -> None:
        self.ids = tuple(map(id, weights))
        self._strict = strict
        self._then = WRITES.now  # before anything is read
        # Tensors made in inference mode count no versions. One of them is enough to look at all bytes of those.
        self._counted = [index for index, weight in enumerate(weights) if not weight.is_inference()]
        self._pick = _picking(self._counted, len(weights))
        self._addresses = list(map(_pointers, weights))
        self._counts = list(map(_versions, self._pick(weights)))
        counted = set(self._counted)
        self._storages = [weight.untyped_storage() for weight in weights]
        self._ranges = list(map(extent, weights))
        known = before._ranges if before else [None] * len(weights)
        self._pieces: list[list[memoryview]] = [
            before._pieces[index] if before and known[index] == at else _pieces(weight, at, whole=index not in counted)
            for index, (weight, at) in enumerate(zip(weights, self._ranges, strict=True))
        ]
        self._memory = [view for views in self._pieces for view in views]
        self._bytes = b"".join(self._memory)
        self._copies = [ctypes.string_at(*at) for at in self._ranges] if strict else []

    def same(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether nothing has been written to since, as far as can be seen."""
        if self._then != WRITES.now:
            now = WRITES.now
            if WRITES.since(self._then, self.ids):
                return False
            self._then = now
        return (
            list(map(_pointers, weights)) == self._addresses
            and list(map(_versions, self._pick(weights))) == self._counts
            and b"".join(self._memory) == self._bytes
            and not (self._strict and any(map(_differs, self._ranges, self._copies)))
        )

    def changed(self, weights: Sequence[torch.Tensor]) -> set[int]:
        """Which of the tensors, by their positions, have been written to since."""
        now = list(map(_pointers, weights))
        found = {index for index, address in enumerate(self._addresses) if now[index] != address}
        counts = zip(self._counted, self._counts, map(_versions, self._pick(weights)), strict=True)
        found |= {index for index, then, count in counts if then != count}
        start = 0
        for index, views in enumerate(self._pieces):
            end = start + sum(map(len, views))
            if index not in found and b"".join(views) != self._bytes[start:end]:
                found.add(index)
            start = end
        if self._strict:
            pairs = enumerate(zip(self._ranges, self._copies, strict=True))
            found |= {index for index, (at, copy) in pairs if index not in found and _differs(at, copy)}
        return found | set(WRITES.since(self._then, self.ids))


def _picking(indices: list[int], count: int) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    if len(indices) == count:
        return lambda weights: weights
    if len(indices) < 2:
        return lambda weights: [weights[index] for index in indices]
    return operator.itemgetter(*indices)


def extent(weight: torch.Tensor) -> tuple[int, int]:
    """Address and length in bytes of the memory that a tensor reaches over; 0 if its storage has not so much."""
    if not weight.numel():
        return weight.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    size = (last + 1) * weight.element_size()
    offset = weight.storage_offset() * weight.element_size()
    return weight.data_ptr(), size if offset + size <= weight.untyped_storage().nbytes() else 0


def overlap(weights: Sequence[torch.Tensor]) -> bool:
    """Whether two tensors share memory, or may: a write to one of them would not be seen on the other."""
    at = sorted((address, size) for address, size in map(extent, weights) if size)
    return any(start + size > following for (start, size), (following, _) in itertools.pairwise(at))


def _pieces(weight: torch.Tensor, at: tuple[int, int], *, whole: bool) -> list[memoryview]:
    """The bytes of a tensor that are compared."""
    address, size = at
    memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    if whole or size <= (_SMALL_VECTOR if weight.ndim == 1 else _SMALL):
        return [memory]
    middle = size // 2
    return [memory[:_SAMPLE], memory[middle : middle + _SAMPLE], memory[-_SAMPLE:]]


def _native_memcmp() -> Callable[[int, bytes, int], int] | None:
    """The C library's comparison, which reads ten times as fast as anything that torch or Python have."""
    try:
        found = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):  # where a process can't be asked for its symbols
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t), ctypes.c_int
    return found


_memcmp = _native_memcmp()


def _differs(at: tuple[int, int], copy: bytes) -> bool:
    address, size = at
    if _memcmp is None:
        return ctypes.string_at(address, size) != copy
    return size > 0 and _memcmp(address, copy, size) != 0
