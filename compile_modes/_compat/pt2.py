"""torch.export's programs: what checks them, what their constructor can't be told, what their .pt2 archives hold.

Checked on torch 2.11.0, 2.13.0, 2.14.1 and 2.15.0.
"""

import copy
import json
import warnings
from typing import Any

import torch
from torch import fx
from torch._export.serde import serialize as serde
from torch._export.serde.schema import ExportedProgram as ProgramSchema
from torch._export.serde.schema import PayloadConfig
from torch._export.serde.schema import PayloadMeta as PayloadMeta
from torch._export.verifier import SpecViolationError as SpecViolationError
from torch._export.verifier import TrainingIRVerifier as TrainingIRVerifier
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

script_object_to_bytes, script_object_from_bytes = torch._C._pickle_save, torch._C._pickle_load_obj
serialize_tensor_meta = serde.serialize_tensor_meta


def load_programs(stream: Any) -> dict[str, torch.export.ExportedProgram]:
    """The programs of an archive, as torch.export.load() reads them, which would log a traceback of what is wrong."""
    with warnings.catch_warnings():
        # torch 2.11 reads weights through a read-only buffer, and copies them.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return dict(load_pt2(stream).exported_programs)


def payloads_to_json(payloads: dict[str, PayloadMeta]) -> bytes:
    """What describes one program's weights, or constants, beside the payloads that hold their bytes."""
    return json.dumps(serde._dataclass_to_dict(PayloadConfig(config=payloads))).encode()


def payloads_from_json(text: bytes) -> dict[str, PayloadMeta]:
    """The reverse of :func:`payloads_to_json`."""
    return dict(serde._dict_to_dataclass(PayloadConfig, json.loads(text)).config)


def payload_place(payload: PayloadMeta) -> tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...], int]:
    """Dtype, device, sizes, strides and storage offset of a tensor."""
    meta: Any = payload.tensor_meta
    sizes, strides = serde.deserialize_size(meta.sizes), serde.deserialize_stride(meta.strides)
    offset = serde.deserialize_storage_offset(meta.storage_offset)
    return serde.deserialize_scalar_type(meta.dtype), serde.deserialize_device(meta.device), sizes, strides, offset


def program_to_bytes(program: torch.export.ExportedProgram, *stand_ins: dict[str, Any]) -> tuple[bytes, bytes]:
    """A program as JSON, and its example inputs, pickled; torch 2.11 pickles state and constants in vain as well."""
    program = copy.copy(readable(program))
    program._state_dict, program._constants = stand_ins
    artifact = serde.serialize(program)
    return artifact.exported_program, artifact.example_inputs


def program_from_bytes(text: bytes, *held: Any) -> torch.export.ExportedProgram:
    """The program of :func:`program_to_bytes` around the very state, constants and example inputs given."""
    return serde.ExportedProgramDeserializer().deserialize(serde._bytes_to_dataclass(ProgramSchema, text), *held)


def readable(program: ExportedProgram) -> ExportedProgram:
    """A program of the same text that torch's reader takes back; the program itself where that needs nothing.

    Of a call of a region that returns nothing (a batch norm run under no_grad for its statistics only), torch writes no
    outputs, makes no ``meta["val"]`` of them when it reads, and refuses the node for that (seen on 2.14.1 and 2.15.0).
    Where ``val`` is None it writes one output that is None, and reads that.
    """
    if not any(_returns_nothing(node) for gm in _graph_modules(program.graph_module) for node in gm.graph.nodes):
        return program
    program = copy.copy(program)
    program._graph_module = _with_none_for_nothing(program.graph_module)
    return program


def _graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.meta.get("val", ()) in ((), [])


def _with_none_for_nothing(gm: fx.GraphModule) -> fx.GraphModule:
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))  # nodes of its own, with dicts of meta of their own
    copied.meta = dict(gm.meta)
    for before, node in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        node.name = before.name  # the signature's: copies of names that Python has taken ("input") get others
        if _returns_nothing(node):
            node.meta["val"] = None
    for name, body in gm.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copied, name, _with_none_for_nothing(body))
    return copied


def with_state(program: ExportedProgram, state: dict[str, Any], constants: dict[str, Any]) -> ExportedProgram:
    """A program with the same graph around other values."""
    program = copy.copy(program)
    program._state_dict, program._constants = state, constants
    return program


def keep_guards(program: ExportedProgram, source: ExportedProgram) -> None:
    """Gives a program the checks of its inputs that another one has; of a program from a file, no shape tells them."""
    if hasattr(source, "_guards_code"):
        program._guards_code = list(source._guards_code)
