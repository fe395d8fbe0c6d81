"""Tensors out of an archive, with everything shared that was shared before."""

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export.pt2_archive import constants as layout

from compile_modes import messages
from compile_modes._compat import pt2
from compile_modes.archive.container import Reader
from compile_modes.archive.storages import CONFIGS, FOLDERS, PREFIXES


class Place(NamedTuple):
    """Where in a storage a tensor lies."""

    dtype: torch.dtype
    device: torch.device
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Loader:
    """Reads tensors, and makes one object again of what was one under several names or in several programs.

    Args:
        reader: the archive.
        sharing: what :meth:`Pool.sharing` returned.
    """

    def __init__(self, reader: Reader, sharing: Mapping[str, list[list[str]]]) -> None:
        self._reader = reader
        self._names = {name: group[0] for group in sharing["ties"] for name in group}
        self._records = {record: group[0] for group in sharing["records"] for record in group}
        self._flat: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._objects: dict[Any, Any] = {}

    def load(self, kind: str, program_name: str) -> dict[str, Any]:
        """The state, or the constants, of a program."""
        payloads = pt2.payloads_from_json(self._reader.read(CONFIGS[kind].format(program_name)))
        return {
            name: self._value(FOLDERS[kind] + payload.path_name, name, payload) for name, payload in payloads.items()
        }

    def _value(self, record: str, name: str, payload: pt2.PayloadMeta) -> Any:
        if payload.use_pickle:
            if record not in self._objects:
                self._objects[record] = _unpickle(record, name, self._reader.read(record))
            return self._objects[record]
        record, place = self._records.get(record, record), Place(*pt2.payload_place(payload))
        requires_grad = bool(payload.tensor_meta and payload.tensor_meta.requires_grad)
        key = (self._names.get(name, name), record, payload.is_param, requires_grad, place)
        if key not in self._objects:
            tensor = self._tensor(record, place)
            if payload.is_param:
                self._objects[key] = nn.Parameter(tensor, requires_grad)
            else:
                self._objects[key] = tensor.requires_grad_(requires_grad)
        return self._objects[key]

    def _tensor(self, record: str, place: Place) -> torch.Tensor:
        if (record, place.device) not in self._flat:
            self._flat[record, place.device] = self._reader.tensor(record).to(place.device)
        flat = self._flat[record, place.device]
        # set_() would enlarge a storage that is too small.
        last = place.offset + sum((n - 1) * step for n, step in zip(place.size, place.stride, strict=True))
        beyond = 0 not in place.size and (last + 1) * place.dtype.itemsize > flat.numel()
        if beyond or min(place.offset, 0, *place.size, *place.stride) < 0:
            raise ValueError(f"a tensor reaches beyond the record {record}")
        tensor = torch.empty(0, dtype=place.dtype, device=place.device)
        return tensor.set_(flat.untyped_storage(), place.offset, place.size, place.stride)


def _unpickle(record: str, name: str, data: bytes) -> Any:
    """Unlike torch's own loader, this runs no code that the file names."""
    path = record.rpartition("/")[2]
    if not path.startswith((*PREFIXES.values(), layout.CUSTOM_OBJ_FILENAME_PREFIX)):
        raise messages.HOLDS_PICKLE.error(name=name)
    try:
        if path.startswith(layout.CUSTOM_OBJ_FILENAME_PREFIX):
            return pt2.script_object_from_bytes(data)
        return torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise messages.UNKNOWN_CLASS.error(error=error, name=name) from error
