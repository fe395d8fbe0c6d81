"""Under which module pickle finds memory formats: a part of every key of torch's caches, and an accident.

A ``torch.memory_format`` knows no module of its own. Pickle takes the first of ``sys.modules`` that has ``torch`` among
its names, and the keys of AOTAutograd's and Inductor's caches are digests of pickles: they depend on who imported torch
first. Of two processes that shall have the same keys, one has to take the order of the other. Checked on torch 2.14.1
and 2.15.0.
"""

import pickle
import sys
import types

import torch

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)


def finders() -> list[str]:
    """The modules in which pickle finds memory formats in this process, in the order of ``sys.modules``."""
    found = {pickle.whichmodule(value, str(value)) for value in _FORMATS}  # type: ignore[attr-defined]
    return [module for module in list(sys.modules) if module in found]


def find_in(names: list[str]) -> None:
    """Has pickle find them where :func:`finders` did in another process.

    A module that this process lacks is stood in for by an empty one, that pickle may find it.
    """
    if names == finders():
        return
    first = {name: sys.modules.get(name) or types.ModuleType(name) for name in names}
    for module in first.values():
        vars(module).setdefault("torch", torch)
    rest = {name: module for name, module in sys.modules.items() if name not in first}
    for name, module in rest.items():  # to the end, in their order
        del sys.modules[name]
        first[name] = module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(first)
