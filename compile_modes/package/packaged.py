"""The module that a package is once it is loaded."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.package.running import Mode
from compile_modes.package.structure import Node, Strange, take


class Packaged(nn.Module):
    """A package: code for some modes, compiled ahead of time, and one set of weights.

    Parameters, buffers and submodules have the names that they had in the model, so that any optimizer, ``state_dict``
    and ``load_state_dict`` work as with it. Flags decide which code runs: those of all submodules together have to be
    a mode that was packaged, which ``train()``, ``eval()`` and :meth:`mode` see to.

    In the mode "train", a call takes the arguments and then the targets of the loss, and returns the loss and the
    outputs. ``loss.backward()`` adds to the gradients of the parameters, once for each call. In any other mode it takes
    the arguments, and returns the outputs. These have the structure that they had in the model; a dict with attributes
    takes the place of the model's own classes. They have no gradients.

    Calls from several threads run one after the other in each mode. Made by :func:`load_package`.
    """

    _modes: dict[str, Mode]
    _package: dict[str, Any]
    _deciders: list[nn.Module]
    _named: dict[tuple[bool, ...], str]
    _places: list[tuple[str, dict[str, nn.Module | None], str, nn.Module]]

    def __init__(self, header: Mapping[str, Any]) -> None:
        """Makes the submodules, without state and code."""
        super().__init__()
        self.__dict__["_package"] = dict(header)
        self.__dict__["_modes"] = {}
        for name, first in header["modules"].items():
            if name:
                parent, _, leaf = name.rpartition(".")
                module = nn.Module() if first == name else submodule(self, first)
                submodule(self, parent)._modules[leaf] = module
        self.__dict__["_deciders"] = [submodule(self, name) for name in header["deciders"]]
        self.__dict__["_places"] = [
            (name, submodule(self, name.rpartition(".")[0])._modules, name.rpartition(".")[2], submodule(self, name))
            for name in header["modules"]
            if name
        ]
        vectors = {name: mode["flags"] for name, mode in header["modes"].items()}
        self.__dict__["_named"] = {
            tuple(vector[owner] for owner in header["deciders"]): name for name, vector in vectors.items()
        }

    def mode(self, name: str) -> "Packaged":
        """Sets the flags of all submodules to those of a packaged mode.

        Args:
            name: of the mode.

        Returns:
            This module.

        Raises:
            PackageError: the package holds no such mode.
        """
        if name not in self._package["modes"]:
            modes = ", ".join(map(repr, self._package["modes"]))
            raise messages.NOT_PACKAGED.error(mode=name, modes=modes)
        for owner, training in self._package["modes"][name]["flags"].items():
            submodule(self, owner).training = training
        return self

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the code of the present mode.

        Raises:
            PackageError: no mode of the package has the present flags, a submodule was replaced, or a weight by one
                that its code can't take.
            CallError: the arguments are others than were compiled for.
        """
        mode = self._present()
        for name, held, leaf, module in self._places:
            if held.get(leaf) is not module:
                raise messages.SUBMODULE_REPLACED.error(name=name)
        tensors = self._tensors(mode, args, kwargs)
        device = torch.device(self._package["device"])
        fitted = mode.signature.fitted(tensors, device)
        mode.state.check_ties()
        if not mode.loss:
            return mode.evaluated(fitted)
        if torch.is_grad_enabled():
            self._check_gradients(mode, tensors)
        return mode.trained(fitted)

    def _present(self) -> Mode:
        """The mode that the flags are."""
        flags = tuple(module.training for module in self._deciders)
        name = self._named.get(flags)
        if name is None:
            words = {True: "train", False: "eval"}
            shown = few(
                f"{o or 'the root'} in {words[f]}" for o, f in zip(self._package["deciders"], flags, strict=True)
            )
            modes = ", ".join(map(repr, self._package["modes"]))
            raise messages.FLAGS_NOT_PACKAGED.error(flags=shown, modes=modes)
        return self._modes[name]

    def _tensors(self, mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors in the arguments of a call."""
        names: list[str] = self._package["names"]
        node: Node = {
            "tuple": self._package["args"]["tuple"] + (self._package["targets"]["tuple"] if mode.loss else [])
        }
        if kwargs:
            rest = names[len(args) :]
            if sorted(kwargs) == sorted(rest) and not (mode.loss and self._package["targets"]["tuple"]):
                args, kwargs = (*args, *(kwargs[name] for name in rest)), {}
        found: list[torch.Tensor] = []
        try:
            if kwargs:
                raise Strange(f"arguments by the names {few(map(repr, kwargs))} are given")
            take(node, args, found)
        except Strange as why:
            targets = len(self._package["targets"]["tuple"])
            wanted = f"{len(names)} arguments ({few(names)})" + (
                f" and {targets} targets" if mode.loss and targets else ""
            )
            raise messages.OTHER_CALL.error(what=why, wanted=wanted, mode=mode.name) from None
        return found

    def _check_gradients(self, mode: Mode, tensors: list[torch.Tensor]) -> None:
        for one, tensor in zip(mode.signature.inputs, tensors, strict=True):
            if tensor.requires_grad:
                raise messages.INPUT_NEEDS_GRAD.error(name=one.name)
        for name in self._package["frozen"]:
            if mode.state.get(name).requires_grad:
                raise messages.NOT_TRAINED.error(name=name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise messages.NO_COPIES.error()


def submodule(module: nn.Module, path: str) -> nn.Module:
    """A submodule by its path, whatever else has its name: a package may hold one called ``mode``."""
    for part in path.split(".") if path else ():
        below = module._modules[part]
        assert below is not None
        module = below
    return module
