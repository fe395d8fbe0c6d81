"""What was compiled ahead for a module: code for each of its modes, and what that takes for granted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compile_modes.package.running import Place, Slot, State, place, slots
from compile_modes.package.signature import Signature
from compile_modes.package.structure import Node, Tree


@dataclass(frozen=True)
class Code:
    """One mode, compiled.

    Attributes:
        data: the function, as bytes; it takes the state, then the tensors of a call.
        flags: of all submodules.
        gradients: whether it has a backward.
        signature: the tensors of a call.
        wanted: of each of these, whether it may get a gradient.
        reads: the state that it takes, in order.
        apart: in how many places of memory that lies.
        constants: the part of the state that the module doesn't hold.
        results: what the module returns.
    """

    data: bytes
    flags: dict[str, bool]
    gradients: bool
    signature: Signature
    wanted: list[bool]
    reads: list[str]
    apart: int
    constants: dict[str, torch.Tensor]
    results: Tree


@dataclass(frozen=True)
class Ahead:
    """What was compiled, for whichever module of its kind.

    Attributes:
        codes: the modes, by name.
        functions: their code, opened.
        kernels: what that needs of Inductor's cache, by name.
        deciders: the submodules whose flags make a difference.
        names: of the arguments.
        keywords: how many of these, the last ones, go by name.
        arguments: what these have to be like.
        weights: of each parameter and buffer that is read, how it lies in memory.
        trained: those among them that get gradients.
        ties: names of one tensor, by the first of them.
        device: that of all tensors.
        around: what of torch's global state was compiled in.
    """

    codes: dict[str, Code]
    functions: dict[str, Callable[..., Sequence[Any]]]
    kernels: dict[str, bytes]
    deciders: list[str]
    names: list[str]
    keywords: int
    arguments: Node
    weights: dict[str, Place]
    trained: set[str]
    ties: dict[str, list[str]]
    device: torch.device
    around: dict[str, str]

    def state(self, module: nn.Module) -> State:
        """The weights of a module, to be compared with those that were compiled for."""
        return State(held(module), self.weights, self.ties)


def held(module: nn.Module) -> dict[str, Slot]:
    """Where a module holds parameters, buffers, and tensors that are neither, by all of their names."""
    found: dict[str, Slot] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        values = vars(submodule)
        leaves = [leaf for leaf, value in values.items() if isinstance(value, torch.Tensor)]
        found |= {f"{path}.{leaf}" if path else leaf: (values, leaf) for leaf in leaves}
    return {**found, **slots(module)}


def apart(tensors: Iterable[torch.Tensor]) -> int:
    """In how many places some tensors begin. Code takes for granted which of them are one."""
    return len({tensor.data_ptr() for tensor in tensors if tensor.numel()})


def weights_of(module: nn.Module, names: Sequence[str]) -> tuple[dict[str, Place], dict[str, list[str]]]:
    """How some of the state of a module lies in memory; and which other names of the module's are the same tensors."""
    found = held(module)
    tensors = {name: slot[leaf] for name, (slot, leaf) in found.items()}
    same: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            same.setdefault(id(tensor), []).append(name)
    ties = {}
    for name in names:
        others = [other for other in same[id(tensors[name])] if other != name]
        if others:
            ties[name] = others
    return {name: place(tensors[name]) for name in names}, ties


def surroundings(device: torch.device) -> dict[str, str]:
    """What of torch's global state code is compiled for."""
    kind = device.type
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    return {
        "torch.autocast": autocast,
        "torch.use_deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "torch.get_default_dtype": str(torch.get_default_dtype()),
    }


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What of the surroundings has changed, in words."""
    return [f"{name} is {now.get(name)}, and was {value}" for name, value in then.items() if now.get(name) != value]
