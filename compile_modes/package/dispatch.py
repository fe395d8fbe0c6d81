"""Which of its modes a module with compiled code is in, and which tensors a call gives it."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.package.structure import Node, Strange, take


class Dispatch:
    """The modes that there is code for, by the flags of the submodules that make a difference.

    Args:
        root: the module.
        names: its submodules, each of its names with the first one.
        deciders: the submodules whose flags make a difference.
        vectors: the flags in each mode.
    """

    def __init__(
        self, root: nn.Module, names: Iterable[str], deciders: Sequence[str], vectors: Mapping[str, Mapping[str, bool]]
    ) -> None:
        self._root, self._owners = root, list(deciders)
        self._deciders = [submodule(root, name) for name in deciders]
        self._places = [
            (name, submodule(root, name.rpartition(".")[0])._modules, name.rpartition(".")[2], submodule(root, name))
            for name in names
            if name
        ]
        self._vectors = {mode: dict(vector) for mode, vector in vectors.items()}
        self._named = {tuple(vector[owner] for owner in deciders): mode for mode, vector in self._vectors.items()}

    def present(self) -> str:
        """The mode that the flags are.

        Raises:
            PackageError: there is no code for these flags.
        """
        flags = tuple(module.training for module in self._deciders)
        if flags in self._named:
            return self._named[flags]
        words = {True: "train", False: "eval"}
        shown = few(f"{o or 'the root'} in {words[f]}" for o, f in zip(self._owners, flags, strict=True))
        raise messages.FLAGS_NOT_PACKAGED.error(flags=shown, modes=", ".join(map(repr, self._vectors)))

    def set(self, mode: str) -> None:
        """Sets the flags of all submodules to those of a mode.

        Raises:
            PackageError: there is no such mode.
        """
        if mode not in self._vectors:
            raise messages.NOT_PACKAGED.error(mode=mode, modes=", ".join(map(repr, self._vectors)))
        for owner, training in self._vectors[mode].items():
            submodule(self._root, owner).training = training

    def check_places(self) -> None:
        """Raises PackageError if a submodule was replaced."""
        for name, held, leaf, module in self._places:
            if held.get(leaf) is not module:
                raise messages.SUBMODULE_REPLACED.error(name=name)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """A submodule by its path, whatever else has its name: a package may hold one called ``mode``."""
    for part in path.split(".") if path else ():
        below = module._modules[part]
        assert below is not None
        module = below
    return module


def signature(names: Sequence[str], keywords: int, targets: Node | None = None) -> inspect.Signature:
    """What ``inspect.signature`` shows of a module that is called by :func:`tensors_given`."""
    by_name = len(names) - keywords
    kind = inspect.Parameter
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in names[:by_name]]
    if targets is not None and targets["tuple"]:
        parameters.append(kind("targets", kind.VAR_POSITIONAL))
    return inspect.Signature([*parameters, *(kind(name, kind.KEYWORD_ONLY) for name in names[by_name:])])


def tensors_given(
    names: Sequence[str],
    keywords: int,
    nodes: tuple[Node, Node],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mode: str,
) -> list[torch.Tensor]:
    """The tensors in the arguments of a call.

    Args:
        names: of the module's arguments, in order; any of them may be given by name.
        keywords: how many of them, the last ones, can be given by name only: their order is nobody's.
        nodes: what these have to be like; and the targets of a loss, which follow, by position.
        args, kwargs: of the call.
        mode: to name in the error.

    Raises:
        CallError: the arguments are unlike those that were compiled for.
    """
    targets = nodes[1]["tuple"]
    count = max(len(args) - len(targets), 0)
    found: list[torch.Tensor] = []
    try:
        rest = names[count:]
        if count > len(names) - keywords or sorted(kwargs) != sorted(rest):
            by_name = f", and by the names {few(map(repr, kwargs))}" if kwargs else ""
            raise Strange(f"{len(args)} are given by position{by_name}")
        values = (*args[:count], *(kwargs[name] for name in rest), *args[count:])
        take({"tuple": nodes[0]["tuple"] + targets}, values, found)
    except Strange as why:
        by_name = f", {few(names[len(names) - keywords :])} by name" if keywords else ""
        wanted = f"{len(names)} arguments ({few(names)}{by_name})" + (f" and {len(targets)} targets" if targets else "")
        raise messages.OTHER_CALL.error(what=why, wanted=wanted, mode=mode) from None
    return found
