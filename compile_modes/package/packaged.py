"""The module that a package is once it is loaded."""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from compile_modes import _compat, messages
from compile_modes.package.dispatch import Dispatch, signature, submodule, tensors_given
from compile_modes.package.running import Mode


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
    _dispatch: Dispatch

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
        vectors = {name: mode["flags"] for name, mode in header["modes"].items()}
        self.__dict__["_dispatch"] = Dispatch(self, header["modules"], header["deciders"], vectors)
        _compat.sign(self, signature(header["names"], header["keywords"], header["targets"]))

    def mode(self, name: str) -> "Packaged":
        """Sets the flags of all submodules to those of a packaged mode.

        Args:
            name: of the mode.

        Returns:
            This module.

        Raises:
            PackageError: the package holds no such mode.
        """
        self._dispatch.set(name)
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
        self._dispatch.check_places()
        targets = self._package["targets"] if mode.loss else {"tuple": []}
        package = self._package
        nodes = (package["args"], targets)
        tensors = tensors_given(package["names"], package["keywords"], nodes, args, kwargs, mode.name)
        fitted = mode.signature.fitted(tensors, torch.device(self._package["device"]))
        mode.state.check_ties()
        if not mode.loss:
            return mode.evaluated(fitted)
        if torch.is_grad_enabled():
            self._check_gradients(mode, tensors)
        return mode.trained(fitted)

    def _present(self) -> Mode:
        """The mode that the flags are."""
        return self._modes[self._dispatch.present()]

    def _check_gradients(self, mode: Mode, tensors: list[torch.Tensor]) -> None:
        for one, tensor in zip(mode.signature.inputs, tensors, strict=True):
            if tensor.requires_grad:
                raise messages.INPUT_NEEDS_GRAD.error(name=one.name)
        for name in self._package["frozen"]:
            if mode.state.get(name).requires_grad:
                raise messages.NOT_TRAINED.error(name=name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise messages.NO_COPIES.error()
