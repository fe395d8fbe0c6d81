"""``load_package``: a package read, checked and opened."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.archive.container import reading
from compile_modes.errors import few, summary
from compile_modes.package import weights
from compile_modes.package.dispatch import submodule
from compile_modes.package.file import read_header
from compile_modes.package.packaged import Packaged
from compile_modes.package.running import Mode, State, place, slots, tied
from compile_modes.package.signature import Signature


def load_package(path: str | os.PathLike[str]) -> Packaged:
    """Reads what :func:`package` has written: a module with the modes that were packaged.

    It needs neither the model's code nor a compiler, compiles nothing, and unpickles nothing. A package holds native
    code all the same: trust it as you would a shared library.

    Args:
        path: the file.

    Returns:
        The module, in the mode that the model was in, if that was packaged, and the first one otherwise.

    Raises:
        ArchiveError: there is no such file, it is damaged, or another kind of file; or it was compiled with another
            torch, or for another device or machine.
        PackageError: this torch has no ahead-of-time training.
    """
    if lacking := aoti.missing():
        raise messages.NO_AOT_TRAINING.error(torch=torch.__version__, name=lacking)
    path = os.fspath(path)
    with reading(path) as reader:
        header = read_header(reader)
        device = fitting(header)
        tensors = weights.read(reader, header["tensors"], device)
        module = _assembled(header, tensors, device)
        for name, held in header["modes"].items():
            module._modes[name] = _mode(path, name, held, module, tensors, device)
    return module.mode(header["start"])


def fitting(header: Mapping[str, Any]) -> torch.device:
    """The device that a package runs on.

    Raises:
        ArchiveError: it was compiled with another torch, or for something that isn't here.
    """
    theirs, ours = str(header["torch"]), str(torch.__version__)
    if theirs.partition("+")[0] != ours.partition("+")[0]:
        raise messages.OTHER_TORCH.error(theirs=theirs, ours=ours)
    machine = header["machine"]
    if machine["device"] not in ("cpu", "cuda") or (machine["device"] == "cuda" and not torch.cuda.is_available()):
        raise messages.NO_DEVICE.error(device=machine["device"])
    device = torch.device("cuda", torch.cuda.current_device()) if machine["device"] == "cuda" else torch.device("cpu")
    here = aoti.machine(device)
    for key in ("system", "machine", "cxx11_abi", "capability"):
        if machine[key] != here[key]:
            raise messages.OTHER_MACHINE.error(what=key, theirs=machine[key], ours=here[key])
    if lacking := sorted(set(machine["extensions"]) - set(here["extensions"])):
        raise messages.OTHER_CPU.error(lacking=few(lacking))
    return device


def _assembled(header: dict[str, Any], tensors: list[torch.Tensor], device: torch.device) -> Packaged:
    """The module with its state, and no code yet."""
    frozen = [entry["name"] for entry in header["state"] if entry["parameter"] and not entry["requires_grad"]]
    module = Packaged({**header, "device": str(device), "frozen": frozen})
    made: dict[int, torch.Tensor] = {}
    for entry in header["state"]:
        index = int(entry["tensor"])
        if index not in made:
            trains = bool(entry["requires_grad"])
            made[index] = nn.Parameter(tensors[index], trains) if entry["parameter"] else tensors[index]
        parent, _, leaf = str(entry["name"]).rpartition(".")
        holder = submodule(module, parent)
        if entry["parameter"]:
            holder._parameters[leaf] = made[index]  # type: ignore[assignment]
        else:
            holder._buffers[leaf] = made[index]
            if not entry["persistent"]:
                holder._non_persistent_buffers_set.add(leaf)
    return module


def _mode(
    path: str, name: str, held: Mapping[str, Any], module: Packaged, tensors: list[torch.Tensor], device: torch.device
) -> Mode:
    try:
        library = aoti.Library(path, name, -1 if device.index is None else device.index)
        needs = library.constants()
    except Exception as error:  # torch raises whatever it comes across
        raise messages.NOT_OPENED.error(mode=name, error=summary(error)) from error
    found = slots(module)
    constants = {constant: tensors[index] for constant, index in held["constants"].items()}
    if unknown := set(needs) - found.keys() - constants.keys():
        raise ValueError(f"the library of mode {name!r} needs {sorted(unknown)}")
    state = State(
        found, {key: place(slot[leaf]) for key, (slot, leaf) in found.items()}, tied(module._package["state"])
    )
    signature = Signature.from_json(held["signature"])
    outputs, results, gradients = held["outputs"], int(held["results"]), list(held["gradients"])
    return Mode(name, library, state, constants, signature, outputs, results, bool(held["loss"]), gradients)
