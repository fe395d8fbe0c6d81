"""Files of one cache of compiled code moved into another: whole, in an order that is right at any time."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from compile_modes._compat import settings

_LAST = ("fxgraph", "aotautograd")  # entries that name kernels, and entries that name those


def publish(private: Path, cache: Path) -> int:
    """Moves what a finished process has compiled into the cache of this one; returns how many files were new there.

    Each file appears under its name at once and complete. One that is there already stays. Kernels come before the
    entries that lead to them. Stopped halfway, this leaves a cache with fewer entries, all of them right.
    """
    names = [path.relative_to(private) for path in private.rglob("*") if path.is_file()]
    wanted = [n for n in names if not settings.belongs_to_triton(n.as_posix()) and not settings.is_temporary(n.name)]
    return sum(_move(private / name, cache / name) for name in sorted(wanted, key=_order))


def _order(name: Path) -> tuple[int, str]:
    return _LAST.index(name.parts[0]) + 1 if name.parts[0] in _LAST else 0, str(name)


def _move(source: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _copy(source, target)
    return True


def _copy(source: Path, target: Path) -> bool:
    if target.exists():
        return False
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        shutil.copy2(source, temporary)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return True
