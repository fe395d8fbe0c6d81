"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, TypeAlias

from compile_modes import messages

FileLike: TypeAlias = str | os.PathLike[str] | IO[bytes]


def label(file: FileLike) -> str:
    """How error messages call a file."""
    return os.fspath(file) if isinstance(file, str | os.PathLike) else f"a {type(file).__name__}"


@contextlib.contextmanager
def replacing(file: FileLike) -> Iterator[IO[bytes]]:
    """A stream whose content takes the place of ``file`` when the block ends well; raises OSError or ArchiveError."""
    if not isinstance(file, str | os.PathLike):
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            shutil.copyfileobj(stream, file)
        return
    target, temporary = _beside(file)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_place(file: FileLike) -> None:
    """Raises ArchiveError if a file can't be written, which :func:`replacing` would find only after long work."""
    if not isinstance(file, str | os.PathLike):
        return
    _, temporary = _beside(file)
    try:
        with open(temporary, "xb"):
            pass
        os.unlink(temporary)
    except OSError as error:
        raise messages.NOT_WRITTEN.error(error=error.strerror or error, file=label(file)) from error


def _beside(file: str | os.PathLike[str]) -> tuple[str, str]:
    """Where a file is, and a name beside it that no other has; raises ArchiveError for what is no plain file."""
    target = os.path.realpath(file)  # a link stays a link
    if os.path.isdir(target):
        raise messages.IS_DIRECTORY.error(file=label(file))
    if os.path.exists(target) and not os.path.isfile(target):  # a device, which os.replace() would do away with
        raise messages.NOT_A_FILE.error(file=label(file))
    directory, name = os.path.split(target)
    return target, os.path.join(directory, f".{name[:100]}.{secrets.token_hex(8)}")
