"""A warm-up in a child process, and its handle."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes._compat import settings, shapes_seen
from compile_modes.errors import ModeWarning
from compile_modes.warming.publishing import publish
from compile_modes.warming.travel import pack

_CHILD = Path(__file__).with_name("child.py")
_ROOM = "compile_modes_warmup"  # the folder in the cache where children work
_DAY = 86400.0
_running: "weakref.WeakSet[Warmup]" = weakref.WeakSet()


class Warmup:
    """A warm-up that runs in a child process: what ``warmup(..., background=True)`` returns.

    It needs no attention. When the child is done, what it has compiled is moved into the cache of this process; should
    it fail, there is one ModeWarning, and modes compile when they are first used, as without it. The child ends with
    this process, and takes what it has not completed with it.
    """

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", place: messages.Place) -> None:
        self._folder, self._process, self._place, self._owner = folder, process, place, os.getpid()
        self._cache = Path(settings.cache_directory())
        self._finished, self._cancelled = threading.Event(), False
        self._error: str | None = None
        self._raised: ModeWarning | None = None
        _running.add(self)
        threading.Thread(target=self._watch, name="compile_modes warm-up", daemon=True).start()

    def __repr__(self) -> str:
        state = "running" if not self.done else "cancelled" if self._cancelled else self._error or "complete"
        return f"<Warmup: {state}>"

    @property
    def done(self) -> bool:
        """Whether it is over: complete, failed or cancelled."""
        return self._finished.is_set()

    @property
    def error(self) -> str | None:
        """Why it failed; None if it did not, or not yet."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is over, at most ``timeout`` seconds, and says whether it is.

        Raises:
            ModeWarning: it failed, and warnings of this kind are errors.
        """
        over = self._finished.wait(timeout)
        if self._raised is not None:
            raise self._raised
        return over

    def cancel(self) -> None:
        """Ends the child, if it is still running. The cache of this process stays as it was."""
        if not self.done and os.getpid() == self._owner:  # in a fork, the child isn't ours
            self._cancelled = True
            self._kill()
            self._finished.wait()

    def _kill(self) -> None:
        for end in (lambda: os.killpg(self._process.pid, signal.SIGKILL), self._process.kill):
            with contextlib.suppress(OSError, AttributeError):  # it has no group yet, or the system has no groups
                end()

    def _watch(self) -> None:
        try:
            code = self._process.wait()
            if not self._cancelled:
                self._error = self._conclude(code)
        except Exception as error:  # the disk is full, say
            self._error = f"{type(error).__name__}: {error}"
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            if self._error is not None:
                self._place.warn(messages.BACKGROUND_FAILED.warning(error=self._error))
        except ModeWarning as warning:
            self._raised = warning
        finally:
            self._finished.set()

    def _conclude(self, code: int) -> str | None:
        """Publishes what the child has compiled; returns what went wrong."""
        result = self._folder / "result.json"
        if not result.exists():
            lines = (self._folder / "log").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            return f"the child ended with code {code}: {last}"
        found = json.loads(result.read_text())
        if "error" in found:
            return str(found["error"])
        publish(self._folder / "cache", self._cache)
        return None


def start(module: nn.Module, args: Any, how: dict[str, Any]) -> Warmup:
    """Starts a child that warms up a copy of a module.

    Args:
        module: a compiled module.
        args: what it will be called with.
        how: the other arguments of the warm-up.

    Raises:
        WarmupError: the module can't be taken to another process, or torch's caches are off.
    """
    if not settings.caches():
        raise messages.NO_CACHE.error()
    place = messages.Place.of_caller()
    folder = _make_folder(Path(settings.cache_directory()) / _ROOM)
    try:
        (folder / "path.json").write_text(json.dumps([os.path.abspath(path) for path in sys.path]))
        request = {"args": args, "how": how, "settings": settings.settings(), "shapes": shapes_seen.seen(module)}
        pack(module, request, folder / "module")
        private = folder / "cache"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(private), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment["TRITON_CACHE_DIR"] = str(private / "triton")
        environment.pop("TORCH_TRACE", None)
        with open(folder / "log", "wb") as log:
            command = [sys.executable, str(_CHILD), str(folder), str(os.getpid())]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Warmup(folder, process, place)


def _make_folder(room: Path) -> Path:
    """A folder of a child's own. Those that a killed process has left are removed a day later."""
    room.mkdir(parents=True, exist_ok=True)
    for left in room.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=room))


@atexit.register
def _end_all() -> None:
    for handle in list(_running):
        handle.cancel()
