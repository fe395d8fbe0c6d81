"""What runs in the child process of a warm-up in the background: ``python child.py FOLDER PID_OF_PARENT``.

Imports nothing but the standard library at first, so that the child sees its parent die from the start.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

NICENESS = 5  # at 10, it stands still on a busy machine


def main(folder: Path, parent: int) -> None:
    """Compiles what was packed into ``folder``, and leaves a result there: how many graphs, or what went wrong."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # so that the compilers it starts can be ended with it
        os.nice(NICENESS)
        threading.Thread(target=_die_with, args=(parent, folder), daemon=True).start()
    sys.path[:] = json.loads((folder / "path.json").read_text())
    try:
        result: dict[str, object] = {"graphs": _compile(folder / "module")}
    except BaseException as error:  # the parent says it
        result = {"error": f"{type(error).__name__}: {error}"}
    temporary = folder / "result.tmp"
    temporary.write_text(json.dumps(result))
    os.replace(temporary, folder / "result.json")


def _compile(file: Path) -> int:
    from compile_modes._compat import settings, shapes_seen  # not before the parent is being watched
    from compile_modes.warming.travel import unpack
    from compile_modes.warming.warmup import warmup

    module, request = unpack(file)
    settings.apply(request["settings"])
    shapes_seen.remember(request["shapes"], module)
    with settings.autocast(request["settings"]):
        graphs: int = warmup(module, *request["args"], progress=False, **request["how"])
    return graphs


def _die_with(parent: int, folder: Path) -> None:
    while os.getppid() == parent:
        time.sleep(0.3)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
