"""The file of an archive: a zip as torch's .pt2 files are, written whole or not at all, and checked while read."""

import contextlib
import io
import os
import sys
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch.export.pt2_archive import PT2ArchiveWriter
from torch.export.pt2_archive.constants import ARCHIVE_FORMAT_PATH, EXTRA_DIR, MODELS_DIR

from compile_modes import messages
from compile_modes.errors import ArchiveError
from compile_modes.files import FileLike as FileLike
from compile_modes.files import label as label
from compile_modes.files import replacing as replacing

HEADER = f"{EXTRA_DIR}compile_modes.json"  # the record that makes an archive one of ours
_CHUNK = 1 << 24


class Sink(io.RawIOBase):
    """A stream that keeps its first error to itself: torch's writer ends the process if a write fails under it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Does nothing; torch.export.save() goes back to the start of the stream that it has written."""
        return 0

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._stream.write(data)
            except BaseException as error:
                self._error = error
        return len(data)

    def check(self) -> None:
        """Raises what a write has raised."""
        if self._error is not None:
            raise self._error


class Writer:
    """Writes records by torch's writer, which aligns them and adds torch's version records and checksums."""

    def __init__(self, archive: PT2ArchiveWriter, sink: Sink) -> None:
        self._archive, self._sink = archive, sink

    def write(self, name: str, data: bytes) -> None:
        self._archive.write_bytes(name, data)
        self._sink.check()

    def write_tensor(self, name: str, data: torch.Tensor) -> None:
        """Writes the storage of ``data``, a flat uint8 tensor on the CPU, without a copy."""
        if data.numel() == 0:
            return self.write(name, b"")
        storage: Any = data.untyped_storage()
        self._archive.archive_file.write_record(name, storage, data.numel())
        self._sink.check()


@contextlib.contextmanager
def writing(file: FileLike) -> Iterator[Writer]:
    """A writer whose archive takes the place of ``file`` when the block ends well; nothing is left if it does not.

    Raises:
        ArchiveError: there is no such directory, the file is a directory, or the disk does not take it.
    """
    try:
        with replacing(file) as stream:
            sink: Any = Sink(stream)
            with PT2ArchiveWriter(sink) as archive:
                yield Writer(archive, sink)
            sink.check()
    except OSError as error:
        raise messages.NOT_WRITTEN.error(error=error, file=label(file)) from error


class Reader:
    """Reads the records of an archive, each with its checksum compared, which torch's reader does not do."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        infos = archive.infolist()
        root = infos[0].filename.partition("/")[0] if infos else ""
        self._infos = {info.filename.removeprefix(f"{root}/"): info for info in infos}
        overlapping = len(self._infos) != len(infos) or sum(info.compress_size for info in infos) > size
        # Of a file that is cut off, zipfile may find a record that is a zip itself, and take it for the whole.
        if overlapping or (infos and min(info.header_offset for info in infos) != 0):
            raise zipfile.BadZipFile("records are missing or overlap")
        if HEADER not in self._infos:
            raise _foreign(set(self._infos), self)
        if any(info.compress_type or info.flag_bits & 1 or info.file_size != info.compress_size for info in infos):
            raise messages.COMPRESSED.error()
        if "byteorder" in self._infos and self.read("byteorder").decode() != sys.byteorder:
            raise messages.OTHER_BYTE_ORDER.error()

    def names(self, folder: str = "") -> list[str]:
        """The records whose name starts with ``folder``."""
        return [name for name in self._infos if name.startswith(folder)]

    def read(self, name: str) -> bytes:
        """The bytes of a record. Raises KeyError if there is none, zipfile.BadZipFile if they have changed."""
        return self._archive.read(self._infos[name])

    def size(self, name: str) -> int:
        """How many bytes a record has."""
        return self._infos[name].file_size

    def check(self, name: str) -> None:
        """Reads a record to its end; raises zipfile.BadZipFile if it has changed."""
        with self._archive.open(self._infos[name]) as stream:
            while stream.read(_CHUNK):
                pass

    def tensor(self, name: str) -> torch.Tensor:
        """The bytes of a record as a flat uint8 tensor with a storage of its own."""
        info, start = self._infos[name], 0
        data = torch.empty(info.file_size, dtype=torch.uint8)
        with self._archive.open(info) as stream:
            while chunk := stream.read(_CHUNK):
                data[start : start + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
                start += len(chunk)
        if start != info.file_size:
            raise zipfile.BadZipFile(f"{name} is cut off")
        return data


@contextlib.contextmanager
def reading(file: FileLike) -> Iterator[Reader]:
    """A reader of an archive that :func:`writing` has written.

    Raises:
        ArchiveError: there is no such file, it is something else, or it is damaged. Whatever is raised in the block
            and is no ArchiveError counts as damage.
    """
    try:
        with contextlib.ExitStack() as stack:
            named = isinstance(file, str | os.PathLike)
            stream: IO[bytes] = stack.enter_context(open(file, "rb")) if named else file  # type: ignore[arg-type,assignment]
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            _check_magic(stream.read(4))
            yield Reader(stack.enter_context(zipfile.ZipFile(stream)), size)
    except ArchiveError as error:
        if error.where:
            raise
        raise error.at(label(file)) from error.__cause__
    except FileNotFoundError as error:
        raise messages.NO_FILE.error(file=label(file)) from error
    except IsADirectoryError as error:
        raise messages.IS_DIRECTORY.error(file=label(file)) from error
    except PermissionError as error:
        raise messages.NO_PERMISSION.error(file=label(file)) from error
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise messages.DAMAGED.error(reason=reason, file=label(file)) from error


def _check_magic(start: bytes) -> None:
    if not start:
        raise messages.EMPTY.error()
    if start.startswith(b"\x80"):
        raise messages.IS_PICKLE.error()
    if not b"PK\x03\x04".startswith(start):
        raise messages.NO_ARCHIVE.error()


def _foreign(names: set[str], reader: Reader) -> ArchiveError:
    """What a zip without our header is."""
    if ARCHIVE_FORMAT_PATH in names:
        if reader.names(MODELS_DIR):
            return messages.IS_EXPORTED.error()
        return messages.NO_PROGRAM.error()
    if "serialized_exported_program.json" in names:
        return messages.IS_OLD.error()
    if "constants.pkl" in names:
        return messages.IS_TORCHSCRIPT.error()
    if "data.pkl" in names:
        return messages.IS_TORCH_SAVE.error()
    return messages.OTHER_ZIP.error()
