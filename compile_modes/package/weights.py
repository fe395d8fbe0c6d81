"""The weights of a package: raw bytes, each storage once, whatever is tied or overlaps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.archive.container import Reader, Writer

Meta = dict[str, Any]


@dataclass
class Pool:
    """Tensors to write.

    Attributes:
        tensors: where each lies, as a package says it: record, dtype, sizes, strides, and offset in elements.
    """

    tensors: list[Meta] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)  # index of a tensor, by identity
    _kept: list[torch.Tensor] = field(default_factory=list)  # so that no other tensor gets its identity
    _records: dict[tuple[torch.device, int], str] = field(default_factory=dict)
    _bytes: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Takes in a tensor; returns its index. One that is known has that index.

        Raises:
            PackageError: it has no bytes that could be written.
        """
        if id(tensor) in self._known:
            return self._known[id(tensor)]
        plain = tensor.detach()
        if type(plain) is not torch.Tensor or plain.layout != torch.strided or plain.is_conj() or plain.is_neg():
            raise messages.STRANGE_WEIGHT.error(what=f"a {type(plain).__name__} of layout {plain.layout}", name=name)
        if plain.device.type not in ("cpu", "cuda"):
            raise messages.STRANGE_WEIGHT.error(what=f"on the device {plain.device}", name=name)
        record = self._record(plain)
        where = {"size": list(plain.shape), "stride": list(plain.stride()), "offset": plain.storage_offset()}
        self.tensors.append(
            {
                "record": record,
                "dtype": str(plain.dtype).removeprefix("torch."),
                **where,
                "device": plain.device.type,
                "constant": False,
            }
        )
        self._kept.append(tensor)
        self._known[id(tensor)] = len(self.tensors) - 1
        return self._known[id(tensor)]

    def add_constant(self, name: str, tensor: torch.Tensor) -> int:
        """Takes in a tensor that nobody writes: of equal ones, one is kept."""
        value = tensor.detach()  # as it lies, which the compiled code takes for granted
        for index, known in enumerate(self._kept):
            if self.tensors[index]["constant"] and _like(known) == _like(value) and _same(known, value):
                return index
        index = self.add(name, value)
        self.tensors[index]["constant"] = True
        return index

    def _record(self, tensor: torch.Tensor) -> str:
        storage = tensor.untyped_storage()
        key = tensor.device, storage.data_ptr() or id(tensor)
        if key not in self._records:
            self._records[key] = record = f"{aoti.WEIGHTS}weight_{len(self._records)}"
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._bytes[record] = flat.cpu()
        return self._records[key]

    def size(self) -> int:
        """How many bytes are to be written."""
        return sum(flat.numel() for flat in self._bytes.values())

    def write(self, writer: Writer) -> None:
        """Writes all records."""
        for name, flat in self._bytes.items():
            writer.write_tensor(name, flat)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes; 0.0 and -0.0 have not."""
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def _like(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def read(reader: Reader, tensors: list[Meta], device: torch.device) -> list[torch.Tensor]:
    """The tensors of a package, on its device. Raises ValueError for one that lies outside of its record."""
    flat: dict[str, torch.Tensor] = {}
    found = []
    for meta in tensors:
        record = str(meta["record"])
        if record not in flat:
            flat[record] = reader.tensor(record).to("cpu" if meta["device"] == "cpu" else device)
        found.append(_placed(flat[record], meta))
    return found


def _placed(flat: torch.Tensor, meta: Meta) -> torch.Tensor:
    dtype = getattr(torch, str(meta["dtype"]))
    size, stride, offset = (tuple(map(int, meta["size"])), tuple(map(int, meta["stride"])), int(meta["offset"]))
    if not isinstance(dtype, torch.dtype) or len(size) != len(stride) or min(offset, 0, *size, *stride) < 0:
        raise ValueError(f"a tensor of {meta}")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > flat.numel():
        raise ValueError(f"a tensor reaches beyond the record {meta['record']}")
    return torch.empty(0, dtype=dtype, device=flat.device).set_(flat.untyped_storage(), offset, size, stride)


def state_of(module: nn.Module, names: Mapping[str, str], pool: Pool) -> list[Meta]:
    """Parameters and buffers of a module by all of their names, taken into a pool.

    Args:
        module: the module.
        names: its submodules; of each name, the first that the submodule has.
        pool: what is to be written.

    Raises:
        PackageError: one has no bytes that could be written, or they aren't all on one device.
    """
    found: list[Meta] = []
    devices: dict[torch.device, str] = {}
    for path, first in names.items():
        if path != first:
            continue
        submodule = module.get_submodule(path)
        held: dict[str, torch.Tensor | None] = {**submodule._parameters, **submodule._buffers}
        for leaf, tensor in held.items():
            if tensor is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            devices.setdefault(tensor.device, name)
            entry = {"name": name, "tensor": pool.add(name, tensor), "parameter": isinstance(tensor, nn.Parameter)}
            entry |= {"requires_grad": tensor.requires_grad}
            entry |= {"persistent": leaf not in submodule._non_persistent_buffers_set}
            found.append(entry)
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise messages.SEVERAL_DEVICES.error(where=where)
    return found
