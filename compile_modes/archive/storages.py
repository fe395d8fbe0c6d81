"""The tensors of several programs as bytes, each storage once."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export.pt2_archive import constants as layout

from compile_modes import _compat, messages
from compile_modes._compat import pt2
from compile_modes.archive.container import Writer

WEIGHTS, CONSTANTS = "weights", "constants"
FOLDERS = {WEIGHTS: layout.WEIGHTS_DIR, CONSTANTS: layout.CONSTANTS_DIR}
CONFIGS = {WEIGHTS: layout.WEIGHTS_CONFIG_FILENAME_FORMAT, CONSTANTS: layout.CONSTANTS_CONFIG_FILENAME_FORMAT}
PREFIXES = {WEIGHTS: layout.WEIGHT_FILENAME_PREFIX, CONSTANTS: layout.TENSOR_CONSTANT_FILENAME_PREFIX}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is strided bytes and no subclass; torch's archives hold any other one pickled."""
    return type(tensor.data) is torch.Tensor and tensor.layout is torch.strided


@dataclass
class _Storage:
    """One storage, the records that hold it (one per folder and dtype, as torch reads them), and values put into it."""

    owner: torch.Tensor  # kept, so that no other storage comes to lie at its address
    records: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # name: (tensor, its new value)

    def flat(self) -> torch.Tensor:
        """The bytes on the CPU, with the new values in them, as a flat uint8 tensor."""
        storage = self.owner.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
        if all(_place(tensor) == _place(value) for tensor, value in self.updates.values()):
            return flat
        flat = flat.clone()
        pairs = {name: (_view(flat, tensor), value) for name, (tensor, value) in self.updates.items()}
        for name, (view, value) in pairs.items():
            _put(name, view, value)
        for name, (view, value) in pairs.items():
            if not torch.equal(_bits(view), _bits(value)):
                raise messages.TIES_DISAGREE.error(name=name)
        return flat


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride()


def _view(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(flat.untyped_storage(), like.storage_offset(), like.size(), like.stride())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _put(name: str, view: torch.Tensor, value: torch.Tensor) -> None:
    for dim in range(view.dim()):
        if view.stride(dim) == 0 and view.size(dim) > 1:  # expanded: copy_() refuses to write one element twice
            view, value = view.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    try:
        view.copy_(value)
    except RuntimeError as error:
        raise messages.NOT_STORED.error(error=error, name=name) from error


class Pool:
    """Collects the tensors of programs, then writes each storage once.

    Args:
        state: values to write instead of those that the programs hold, by name.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state, self._used = state, set[str]()
        self._storages: dict[tuple[torch.device, int], _Storage] = {}
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._pickles: dict[tuple[str, int], tuple[str, str, Any]] = {}  # by folder and identity of the object
        self._counts: dict[str, int] = {}
        self._names: dict[int, list[str]] = {}
        self._grads: dict[int, bool] = {}  # what new values decide, for all names of a parameter
        self._configs: dict[str, bytes] = {}

    def add(self, program_name: str, program: torch.export.ExportedProgram) -> None:
        """Takes in the state and the constants of a program. Raises ArchiveError for what can't be stored."""
        free = {*program.state_dict, *program.graph_signature.non_persistent_buffers}
        for kind, held in ((WEIGHTS, program.state_dict), (CONSTANTS, program.constants)):
            news = {name: self._state[name] for name in held if name in free and name in self._state}
            self._used |= set(news)
            for name, new in news.items():
                if isinstance(held[name], nn.Parameter) and isinstance(new, nn.Parameter):
                    self._grads[id(held[name])] = new.requires_grad
            payloads = {name: self._payload(kind, name, value, news.get(name)) for name, value in held.items()}
            self._configs[CONFIGS[kind].format(program_name)] = pt2.payloads_to_json(payloads)

    def _payload(self, kind: str, name: str, value: Any, new: torch.Tensor | None) -> pt2.PayloadMeta:
        names = self._names.setdefault(id(value), [])
        if name not in names:
            names.append(name)
        if not isinstance(value, torch.Tensor):
            return pt2.PayloadMeta(self._object(name, value), is_param=False, use_pickle=True, tensor_meta=None)
        plain, is_param = _is_plain(value), isinstance(value, nn.Parameter)
        tensor = self._resolved(value) if plain else value
        meta = _describe(name, tensor, new)
        meta.requires_grad = self._grads.get(id(value), value.requires_grad)
        path = self._raw(kind, name, value, tensor, new) if plain else self._pickled(kind, name, value, new)
        return pt2.PayloadMeta(path, is_param, use_pickle=not plain, tensor_meta=meta)

    def _resolved(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` without conjugate and negative bit, which torch's format has no place for."""
        if not (value.is_conj() or value.is_neg()):
            return value.detach()
        start = value.untyped_storage().data_ptr(), value.storage_offset()
        key = (value.device, *start, value.size(), value.stride(), value.is_conj(), value.is_neg())
        return self._copies.setdefault(key, value.detach().resolve_conj().resolve_neg())

    def _number(self, prefix: str) -> str:
        self._counts[prefix] = self._counts.get(prefix, -1) + 1
        return f"{prefix}{self._counts[prefix]}"

    def _raw(self, kind: str, name: str, value: Any, tensor: torch.Tensor, new: torch.Tensor | None) -> str:
        held = tensor.untyped_storage()
        storage = self._storages.setdefault((held.device, held.data_ptr() or id(value)), _Storage(tensor))
        if held.nbytes() > storage.owner.untyped_storage().nbytes():  # one memory wrapped twice, by from_numpy() say
            storage.owner = tensor
        if new is not None:
            storage.updates[name] = (tensor, new.detach().resolve_conj().resolve_neg())
        record = (kind, value.dtype)
        if record not in storage.records:
            storage.records[record] = self._number(PREFIXES[kind])
        return storage.records[record]

    def _pickled(self, kind: str, name: str, value: torch.Tensor, new: torch.Tensor | None) -> str:
        stored = value if new is None else new
        if isinstance(value, nn.Parameter) and not isinstance(stored, nn.Parameter):
            stored = nn.Parameter(stored, value.requires_grad)
        return self._once(kind, name, PREFIXES[kind], value, stored)

    def _object(self, name: str, value: Any) -> str:
        if not isinstance(value, torch.ScriptObject):
            raise messages.PICKLED_CONSTANT.error(kind=type(value).__name__, name=name)
        return self._once(CONSTANTS, name, layout.CUSTOM_OBJ_FILENAME_PREFIX, value, value)

    def _once(self, kind: str, name: str, prefix: str, value: Any, stored: Any) -> str:
        if (kind, id(value)) not in self._pickles:
            self._pickles[kind, id(value)] = (self._number(prefix), name, stored)
        return self._pickles[kind, id(value)][0]

    def sharing(self) -> dict[str, list[list[str]]]:
        """What the payload descriptions don't say: names of one tensor, and records that are one storage."""
        unknown = sorted(set(self._state) - self._used)
        if unknown:
            raise messages.NO_SUCH_STATE.error(names=", ".join(f"state[{name!r}]" for name in unknown))
        ties = [names for names in self._names.values() if len(names) > 1]
        records = [[FOLDERS[kind] + path for (kind, _), path in s.records.items()] for s in self._storages.values()]
        return {"ties": ties, "records": [group for group in records if len(group) > 1]}

    def write(self, writer: Writer) -> None:
        """Writes the payloads and what describes them."""
        for storage in self._storages.values():
            flat = storage.flat()
            for (kind, _), path in storage.records.items():
                writer.write_tensor(FOLDERS[kind] + path, flat)
        for (kind, _), (path, name, value) in self._pickles.items():
            writer.write(FOLDERS[kind] + path, _pickle(name, value))
        for record, config in self._configs.items():
            writer.write(record, config)


def _kind(tensor: torch.Tensor) -> str:
    shape = "no shape" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
    return f"{type(tensor.data).__name__} of {tensor.dtype}, {tensor.layout} and {shape}"


def _describe(name: str, value: torch.Tensor, new: torch.Tensor | None) -> Any:
    """torch's description of a tensor. Raises ArchiveError if it, or what is to be stored instead, can't be stored."""
    for where, tensor in ((name, value), (f"state[{name!r}]", value if new is None else new)):
        if not isinstance(tensor, torch.Tensor):
            raise messages.NOT_A_TENSOR.error(kind=type(tensor).__name__, where=where)
        if tensor.is_meta or isinstance(tensor, _compat.FakeTensor):
            raise messages.NO_VALUES.error(where=where)
    if new is not None and _kind(new) != _kind(value):
        raise messages.OTHER_KIND.error(before=_kind(value), now=_kind(new), name=name)
    try:
        return pt2.serialize_tensor_meta(value)
    except (KeyError, RuntimeError) as error:  # a layout without strides, a dtype without a number
        raise messages.NO_RECORD_FOR.error(kind=_kind(value), name=name) from error


def _pickle(name: str, value: Any) -> bytes:
    if isinstance(value, torch.ScriptObject):
        return bytes(pt2.script_object_to_bytes(value))
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # whatever the class of the tensor raises
        raise messages.NOT_PICKLED.error(kind=_kind(value), error=error, name=name) from error
    return buffer.getvalue()
