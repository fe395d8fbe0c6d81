"""Where in a model an export has failed."""

import os
from collections.abc import Iterator
from types import FrameType

from torch import nn

from compile_modes._compat.readers import TORCH


def place_of(error: BaseException, model: nn.Module) -> str:
    """The class of a model, and the module and line that ran when an error was raised, as far as that shows."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, line in _frames(error):
        code = frame.f_code
        module = frame.f_locals.get("self")
        if id(module) in names and not code.co_filename.startswith(TORCH):
            name = names[id(module)]
            found = f"{f', in {name!r}' if name else ''} ({os.path.basename(code.co_filename)}:{line})"
    return type(model).__name__ + found


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that an error and its causes have come through, the outermost first, each with its line."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for raised in chain:
        trace = raised.__traceback__
        while trace is not None:
            yield trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next
