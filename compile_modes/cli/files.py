"""Files of the command line: what torch.export.save() or cm.save() has written, and programs to write."""

import os
import textwrap
import warnings
import zipfile
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes._compat import pt2
from compile_modes.archive import programs as archive
from compile_modes.archive.container import Sink, replacing
from compile_modes.errors import ExportedFile, ModeWarning, first_line
from compile_modes.exported.provenance import Source
from compile_modes.exported.saving import load


@dataclass(frozen=True)
class Opened:
    """What a file holds.

    Attributes:
        writer: "torch.export.save" or "compile_modes.save".
        content: the program; or the module that :func:`compile_modes.load` makes of the file.
        programs: the programs as they are stored, by name: "model", or "train" and "eval".
    """

    writer: str
    content: ExportedProgram | nn.Module
    programs: dict[str, ExportedProgram]


def open_file(path: str) -> Opened:
    """Reads a ``.pt2`` file, whichever of the two has written it.

    torch.export.load() unpickles what a file names: files from sources that aren't trusted should not be opened.

    Raises:
        ArchiveError: there is no such file, it holds no program, or it is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ModeWarning)  # of binding; explain and bake say what is left of it
            warnings.filterwarnings("default", messages.EXAMPLES_LEFT_OUT.code, ModeWarning)
            module = load(path)
    except ExportedFile:
        program = _exported(path)
        return Opened("torch.export.save", program, {"model": program})
    source = Source.of(module)
    assert source is not None
    return Opened("compile_modes.save", module, source.programs)


def _exported(path: str) -> ExportedProgram:
    with open(path, "rb") as stream:
        if damage := _damage(stream):
            raise messages.PROGRAM_DAMAGED.error(damage=damage, file=path)
        stream.seek(0)
        try:
            programs = pt2.load_programs(stream)
        except Exception as error:  # torch raises whatever its deserializer comes across
            said = f"{type(error).__name__}: {_first_line(error)}"
            raise messages.PROGRAM_NOT_LOADABLE.error(torch=torch.__version__, error=said, file=path) from error
    if programs.keys() != {"model"}:
        names = ", ".join(map(repr, programs))
        raise messages.SEVERAL_PROGRAMS.error(names=names, file=path)
    return programs["model"]


def _damage(stream: IO[bytes]) -> str:
    """What is wrong with the bytes of an archive, which torch does not ask; empty if nothing is."""
    try:
        with zipfile.ZipFile(stream) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile raises a variety
        return _first_line(error)
    return f"the checksum of {bad}" if bad is not None else ""


def check_free(path: str) -> None:
    """Raises ArchiveError if there is such a file; what else may be wrong with a path shows when it is written to."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise messages.EXISTS.error(file=path)


def write_program(program: ExportedProgram, path: str) -> None:
    """Writes a program with torch.export.save(); the file appears whole or not at all, in place of one that is there.

    Raises:
        ArchiveError: the file can't be written, or torch can't serialize the program, or not so that it could be read
            back.
    """
    archive.to_bytes("model", program)  # ahead of the file: what it raises says why
    try:
        with replacing(path) as stream:
            _save(program, stream)
    except OSError as error:
        raise messages.NOT_WRITTEN.error(error=error.strerror or error, file=path) from error


def _save(program: ExportedProgram, stream: Any) -> None:
    sink: Any = Sink(stream)
    try:
        torch.export.save(pt2.readable(program), sink)
    except Exception as error:  # torch raises whatever its serializer comes across
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise messages.NOT_SERIALIZED.error(error=reason, where="") from error
    sink.check()


def _first_line(error: Exception) -> str:
    return textwrap.shorten(first_line(error), 500)  # torch may quote a node with all its meta
