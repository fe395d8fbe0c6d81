"""A compiled module, and what it will be called with, in a file for another process of this machine."""

import io
import os
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import messages
from compile_modes._compat import recipes
from compile_modes.errors import CompileModesError, summary
from compile_modes.exported.provenance import Source
from compile_modes.exported.saving import load, save


def pack(module: nn.Module, request: dict[str, Any], path: Path) -> None:
    """Writes a module, how its parts are compiled, and a request into a file; the module stays as it is.

    Python's pickle takes eager modules, by the names of their classes; ``cm.save`` takes modules with modes.

    Raises:
        WarmupError: a class stands where another process can't import it, or something can't be pickled.
    """
    in_place = {name: recipes.in_place(part) for name, part in module.named_modules()}
    what = {"module": module, "in_place": {name: how for name, how in in_place.items() if how}, "request": request}
    way: Any = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler)
    try:
        torch.save(what, path, pickle_module=way)
    except CompileModesError as error:
        if error.code == messages.IN_MAIN.code:
            raise
        raise messages.NOT_PICKLABLE.error(error=error.headline) from error
    except Exception as error:  # pickle raises whatever the objects on its way do
        raise messages.NOT_PICKLABLE.error(error=summary(error)) from error


def unpack(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The module, compiled as it was, and the request. It runs what the file says: only for files of :func:`pack`."""
    what = torch.load(path, weights_only=False)
    os.unlink(path)
    module: nn.Module = what["module"]
    parts = dict(module.named_modules())
    for name, how in what["in_place"].items():
        parts[name].compile(**how)
    return module, what["request"]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """What pickle does otherwise than by itself."""
        kind = value if isinstance(value, type | types.FunctionType) else type(value)
        if kind.__module__ == "__main__":
            raise messages.IN_MAIN.error(name=kind.__qualname__)
        if recipes.is_wrapper(value):
            return _wrapped, (recipes.inside(value), recipes.of_wrapper(value))
        if isinstance(value, nn.Module) and Source.of(value) is not None:
            file = io.BytesIO()
            save(value, file)
            return _loaded, (file.getvalue(),)
        if isinstance(value, fx.GraphModule | UnflattenedModule):
            raise messages.NOT_SAVABLE.error(kind=type(value).__name__, file="the file for the other process")
        if isinstance(value, types.FunctionType) and (how := recipes.of_function(value)) is not None:
            method: Any = value._torchdynamo_orig_callable  # type: ignore[attr-defined]
            return _method, (method.__self__, method.__name__, how)
        return NotImplemented


def _wrapped(module: nn.Module, how: dict[str, Any]) -> Any:
    return torch.compile(module, **how)


def _loaded(data: bytes) -> nn.Module:
    return load(io.BytesIO(data))


def _method(module: nn.Module, name: str, how: dict[str, Any]) -> Any:
    return torch.compile(types.MethodType(getattr(type(module), name), module), **how)
