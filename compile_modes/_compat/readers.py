"""Whose mode is read while a model runs.

Checked on torch 2.14.1 and 2.15.0: nothing in ``nn.Module`` itself is called ``training``; it is an attribute of each
instance, which a property of the class comes before.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import torch
from torch import nn

TORCH = os.path.join(os.path.dirname(torch.__file__), "")  # what the names of torch's own files begin with
_NN = os.path.join(TORCH, "nn", "")  # layers, and in utils what looks at their mode for more than an op
_LAYERS = os.path.join(TORCH, "nn", "modules", "")
_recording = threading.RLock()  # a property of a class is everybody's


@contextlib.contextmanager
def mode_reads(model: nn.Module, found: set[str], by_others: set[str]) -> Iterator[None]:
    """Notes modules of a model whose ``training`` is read in it, by all of their names.

    Left out are the reads of torch's own layers without children, which hand their mode to an op and do nothing else
    with it, and those of torch's machinery.

    Args:
        model: the model.
        found: names are added to it.
        by_others: and to it those whose mode something else reads than a method of the module.
    """
    names: dict[int, list[str]] = {}  # by their attributes: torch.export passes proxies around, which share these
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(vars(module)), []).append(name)
    here = threading.get_ident()

    def read(module: nn.Module) -> bool:
        if torch.compiler.is_dynamo_compiling():  # a branch of torch.cond; Dynamo follows no more than this
            return module.__dict__["training"]  # type: ignore[no-any-return]
        if threading.get_ident() == here and id(vars(module)) in names:
            frame = sys._getframe(1)
            reader = frame.f_code.co_filename
            handed_on = reader.startswith(_LAYERS) and not module._modules
            if not reader.startswith(TORCH) or (reader.startswith(_NN) and not handed_on):
                found.update(names[id(vars(module))])
                names_of = frame.f_code.co_varnames
                itself = frame.f_locals.get(names_of[0]) if names_of else None  # "self", as a rule
                own = isinstance(itself, nn.Module) and vars(itself) is vars(module)
                if not own and not reader.startswith(_NN):
                    by_others.update(names[id(vars(module))])
        try:
            return bool(module.__dict__["training"])
        except KeyError:
            raise AttributeError(f"{type(module).__name__!r} object has no attribute 'training'") from None

    def write(module: nn.Module, mode: bool) -> None:
        module.__dict__["training"] = mode

    with _recording:
        nn.Module.training = property(read, write)  # type: ignore[assignment]
        try:
            yield
        finally:
            del nn.Module.training
