"""One ``.pt2`` file for one or two exported programs, with every weight stored once.

The file is torch's own format: ``torch.export.pt2_archive`` reads it, and ``torch.export.load`` does if a program is
called "model". Beside torch's records there is one of ours, ``extra/compile_modes.json``.

How far a file need be trusted: torch's loader unpickles tensor subclasses and example inputs, the latter after a try
with ``weights_only``, and so runs whatever code the file names; it also evaluates symbolic sizes as Python
expressions and lets a graph call any function below ``torch``. :func:`read` never unpickles more than ``weights_only``
allows, and loads no compiled libraries. The graph and its sizes are torch's to deserialize: a file from a source that
isn't trusted should not be read.
"""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.pt2_archive.constants import MODELS_DIR, MODELS_FILENAME_FORMAT, SAMPLE_INPUTS_FILENAME_FORMAT

from compile_modes import messages
from compile_modes._compat import pt2
from compile_modes.archive.container import HEADER, FileLike, Reader, label, reading, writing
from compile_modes.archive.loader import Loader
from compile_modes.archive.storages import CONSTANTS, WEIGHTS, Pool
from compile_modes.errors import ArchiveError, summary

FORMAT = 1  # the newest version of HEADER that is understood; raised when an older reader would misread a file


def write(
    path: FileLike,
    programs: Mapping[str, ExportedProgram],
    notes: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes programs into one file, which appears whole or not at all.

    Tensors of one storage are stored once, whether they belong to one program or to several. What has another storage
    is stored apart, also under the same name.

    Args:
        path: the file; or a file object, which is written to at the end.
        programs: the programs by name ("train", "eval"), letters, digits and underscores. They stay as they are.
        notes: what to store beside them, anything that JSON gives back unchanged.
        state: values to store instead of those that the programs hold, by name of parameter or buffer. An
            ``nn.Parameter`` among them also decides whether the stored one requires grad.

    Raises:
        ArchiveError: the file can't be written, or something can't be stored: it is said what.
    """
    where = label(path)
    for name, program in programs.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or not isinstance(program, ExportedProgram):
            raise messages.NOT_A_PROGRAM.error(name=name, kind=type(program).__name__, file=where)
    if not programs:
        raise messages.NO_PROGRAMS.error(file=where)
    pool = Pool(state or {})
    for name, program in programs.items():
        pool.add(name, program)
    header = {"format": FORMAT, "torch": str(torch.__version__), "programs": list(programs), **pool.sharing()}
    text = _to_json({**header, "notes": dict(notes)})
    graphs = {name: to_bytes(name, program) for name, program in programs.items()}
    with writing(path) as writer:
        pool.write(writer)
        for name, (graph, example_inputs) in graphs.items():
            writer.write(MODELS_FILENAME_FORMAT.format(name), graph)
            writer.write(SAMPLE_INPUTS_FILENAME_FORMAT.format(name), example_inputs)
        writer.write(HEADER, text)


def read(path: FileLike) -> tuple[dict[str, ExportedProgram], dict[str, Any]]:
    """Reads what :func:`write` has written.

    Args:
        path: the file, or a file object that can seek.

    Returns:
        The programs by name, and the notes. Programs hold the same tensor under the same name if they did before, and
        tied weights are one tensor again.

    Raises:
        ArchiveError: there is no such file, it is something else, newer or damaged, or this process lacks what a
            program needs.

    Warns:
        ModeWarning: example inputs were left out, for reading them would run code that the file names.
    """
    with reading(path) as reader:
        header = _header(reader)
        loader = Loader(reader, header)
        parts = {}
        for name in header["programs"]:
            graph = reader.read(MODELS_FILENAME_FORMAT.format(name))
            example_inputs = reader.read(SAMPLE_INPUTS_FILENAME_FORMAT.format(name))
            parts[name] = (graph, loader.load(WEIGHTS, name), loader.load(CONSTANTS, name), example_inputs)
    programs = {}
    for name, (graph, state, constants, example_inputs) in parts.items():
        inputs = _example_inputs(name, example_inputs)
        try:
            programs[name] = pt2.program_from_bytes(graph, state, constants, inputs)
        except Exception as error:
            raise _not_loadable(name, graph, header.get("torch"), label(path), error) from error
    return programs, header["notes"]


def _to_json(header: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise messages.NOTES_NOT_JSON.error(error=error) from error
    if json.loads(text) != header:
        raise messages.NOTES_CHANGE.error()
    return text.encode()


def to_bytes(name: str, program: ExportedProgram) -> tuple[bytes, bytes]:
    """A program as :func:`read` takes it back, without its tensors; and its example inputs.

    It is read again here to make sure of that, with something small in the place of each tensor, so that no weight is
    copied. That takes as long as the graph takes to be read: 0.6 s for 20 blocks of convolution, norm and ReLU, which
    makes saving them half as slow again.

    Raises:
        ArchiveError: torch can't write the program, or not so that it could be read back.
    """
    stand_ins = [{key: _stand_in(value) for key, value in h.items()} for h in (program.state_dict, program.constants)]
    where = f"program {name!r}"
    try:
        written = pt2.program_to_bytes(program, *stand_ins)
    except Exception as error:  # torch raises whatever its serializer comes across
        raise messages.NOT_SERIALIZED.error(error=summary(error), where=where) from error
    try:
        pt2.program_from_bytes(written[0], *stand_ins, None)
    except Exception as error:  # likewise its deserializer
        raise messages.NOT_READ_BACK.error(error=summary(error), where=where) from error
    return written


def _stand_in(value: Any) -> Any:
    """Something small of the kind that torch's checks of a program ask for."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty(0), requires_grad=False)
    return torch.empty(0) if isinstance(value, torch.Tensor) else value


def _header(reader: Reader) -> dict[str, Any]:
    header = json.loads(reader.read(HEADER))
    if "package" in header:
        raise messages.IS_PACKAGE.error()
    if "precompiled" in header:
        raise messages.IS_PRECOMPILED.error()
    version = header["format"]
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"format {version!r}")
    if version > FORMAT:
        raise messages.NEWER_FORMAT.error(format=version, torch=header.get("torch"), newest=FORMAT)
    if not isinstance(header["notes"], dict):
        raise ValueError("the notes are no dict")
    for name in {MODELS_FILENAME_FORMAT.format(name) for name in header["programs"]} ^ set(reader.names(MODELS_DIR)):
        raise ValueError(f"the record {name} is missing or unknown")
    return dict(header)


def _example_inputs(name: str, data: bytes) -> Any:
    if not data:
        return None
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # a pickle can raise anything; the program works without them
        messages.EXAMPLES_LEFT_OUT.warn(name=name, error=summary(error))
        return None


def _not_loadable(name: str, graph: bytes, version: Any, where: str, error: Exception) -> ArchiveError:
    try:
        unknown = sorted(target for target in _targets(json.loads(graph)) if not _exists(target))
    except ValueError:  # that is no JSON; error says so
        unknown = []
    if unknown:
        return messages.UNKNOWN_OPERATORS.error(name=name, operators=", ".join(unknown), file=where)
    said = {"torch": torch.__version__, "writer": version, "error": summary(error)}
    return messages.NOT_LOADABLE.error(**said, name=name, file=where)


def _targets(part: Any) -> set[str]:
    """The operators in the JSON of a program."""
    if isinstance(part, list):
        return set().union(*(_targets(value) for value in part))
    if not isinstance(part, dict):
        return set()
    target = part.get("target")
    own = {target} if isinstance(target, str) and target.startswith("torch.ops.") else set()
    return own.union(*(_targets(value) for value in part.values()))


def _exists(target: str) -> bool:
    found: Any = torch
    for part in target.split(".")[1:]:
        found = getattr(found, part, None)
    return found is not None
