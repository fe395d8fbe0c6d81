"""The module that runs another one by code that was compiled ahead."""

import copy
from typing import Any, NoReturn

import torch
from torch import nn

from compile_modes import _compat, messages
from compile_modes.errors import few
from compile_modes.files import FileLike
from compile_modes.package import ahead_file
from compile_modes.package.ahead import Ahead, Code, apart, differences, surroundings
from compile_modes.package.dispatch import Dispatch, signature, tensors_given
from compile_modes.package.running import State
from compile_modes.package.structure import Node
from compile_modes.package.watch import Watch

_NO_TARGETS: Node = {"tuple": []}


class Precompiled(nn.Module):
    """A module whose calls run code that was compiled ahead, in the mode of its flags. Made by :func:`precompile`.

    As with ``torch.compile``, the module is inside, under ``_orig_mod``: it has the weights and the flags, attributes
    are looked up in it, and ``train()``, ``eval()``, ``parameters()`` and optimizers go on working. Nothing is compiled
    at a call. What the code takes for granted is compared at each call: flags, arguments, weights, submodules, hooks,
    and the attributes that submodules hold. What it hasn't been compiled for is refused.
    """

    wraps_a_module = True
    _ahead: Ahead
    _state: State
    _dispatch: Dispatch
    _watch: Watch

    def __init__(self, module: nn.Module, ahead: Ahead) -> None:
        """Puts code around a module as it is now."""
        super().__init__()
        super().__setattr__("_orig_mod", module)
        self.__dict__["training"] = module.training
        flags = {mode: code.flags for mode, code in ahead.codes.items()}
        names = [name for name, _ in module.named_modules(remove_duplicate=False)]
        self.__dict__.update(
            {
                "_ahead": ahead,
                "_state": ahead.state(module),
                "_dispatch": Dispatch(module, names, ahead.deciders, flags),
                "_watch": Watch(module),
            }
        )
        _compat.sign(self, signature(ahead.names, ahead.keywords))

    def mode(self, name: str) -> "Precompiled":
        """Sets the flags of all submodules to those of a mode that was compiled.

        Args:
            name: of the mode.

        Returns:
            This module.

        Raises:
            PackageError: there is no such mode.
        """
        self._dispatch.set(name)
        self.__dict__["training"] = self._orig_mod.training
        return self

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the code of the present mode.

        Raises:
            PackageError: no mode with the present flags was compiled, or what the code takes for granted has changed.
            CallError: the arguments are others than were compiled for.
        """
        ahead, mode = self._ahead, self._dispatch.present()
        code = ahead.codes[mode]
        self._dispatch.check_places()
        self._watch.check()
        if changed := differences(ahead.around, surroundings(ahead.device)):
            raise messages.OTHER_SURROUNDINGS.error(what=few(changed))
        tensors = tensors_given(ahead.names, ahead.keywords, (ahead.arguments, _NO_TARGETS), args, kwargs, mode)
        code.signature.check(tensors, ahead.device)
        state = [self._weight(name, code) for name in code.reads]
        self._check_ties(code, state)
        if code.gradients and torch.is_inference_mode_enabled():
            raise messages.INFERENCE_MODE.error(mode=mode)
        if torch.is_grad_enabled():
            self._check_gradients(mode, code, state, tensors)
        plain = [tensor.resolve_conj().resolve_neg().contiguous() for tensor in tensors]
        found = ahead.functions[mode](*state, *plain)
        return code.results.build([one for one in found if isinstance(one, torch.Tensor)])

    def _weight(self, name: str, code: Code) -> torch.Tensor:
        """A parameter, a buffer or a constant, as it is now."""
        if name in code.constants:
            return code.constants[name]
        tensor = self._state.get(name)
        self._state.check(name, tensor)
        return tensor

    def _check_ties(self, code: Code, state: list[torch.Tensor]) -> None:
        """Raises PackageError unless names of one tensor still are that, and others aren't."""
        for first, others in self._ahead.ties.items():
            for other in others:
                if self._state.get(other) is not self._state.get(first):
                    raise messages.UNTIED.error(name=other, other=first)
        held = [tensor for name, tensor in zip(code.reads, state, strict=True) if name not in code.constants]
        if apart(held) != code.apart:
            raise messages.TIED.error()

    def _check_gradients(self, mode: str, code: Code, state: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        if not code.gradients:
            if any(tensor.requires_grad for tensor in (*state, *tensors)):
                raise messages.NO_BACKWARD.error(mode=mode)
            return
        for name, tensor in zip(code.reads, state, strict=True):
            if tensor.requires_grad and name not in self._ahead.trained:
                raise messages.NOT_TRAINED.error(name=name)
        for one, tensor, wanted in zip(code.signature.inputs, tensors, code.wanted, strict=True):
            if tensor.requires_grad and not wanted:
                raise messages.INPUT_NEEDS_GRAD.error(name=one.name)

    def save(self, path: FileLike) -> None:
        """Writes the code, without weights, to be read by :func:`load_precompiled`.

        Args:
            path: the file. It appears whole or not at all.

        Raises:
            PackageError: what the code takes for granted of the module has changed.
            ArchiveError: it can't be written.
        """
        self._watch.check()
        ahead_file.write(path, self._ahead, self._watch.described())

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets attributes of the module inside, as ``torch.compile``'s wrapper does."""
        if name == "training":
            self.__dict__[name] = value
        setattr(self._orig_mod, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._orig_mod, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Precompiled":
        self._watch.check()  # the copy's is made of the copy
        made = Precompiled(copy.deepcopy(self._orig_mod, memo), self._ahead)
        hooks = {key: copy.copy(value) for key, value in vars(self).items() if key.endswith("_hooks")}
        made.__dict__.update(hooks)
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise messages.NO_PICKLE.error()
