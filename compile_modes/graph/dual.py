"""Two programs of one model, for what flags can't express: its ``forward`` runs the one for ``self.training``."""

import copy
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes._compat.copies import Copying


class DualModule(nn.Module):
    """The train and the eval program of one model, with one set of submodules, parameters and buffers.

    ``train()`` and ``eval()`` choose the program, and set the flags that its sites read, as in any nn.Module. The mode
    of a submodule decides the sites that it owns in either program; what Python decided on export (which layers run,
    what is returned) follows the mode of the root.

    Attributes:
        difference: what the programs differ in besides modes.
    """

    difference: str
    _programs: dict[bool, fx.GraphModule]

    def __init__(self, train: fx.GraphModule, evaluation: fx.GraphModule, difference: str) -> None:
        """Takes two bound programs over, the second after :func:`share` and binding."""
        super().__init__()
        self.difference = difference
        self.meta: dict[str, Any] = {}
        self._programs = {True: train, False: evaluation}
        for program in (train, evaluation):
            self._modules.update({n: m for n, m in program._modules.items() if m is not None and not _private(n, m)})
            self._parameters.update(program._parameters)
            self._buffers.update(program._buffers)
            self._non_persistent_buffers_set.update(program._non_persistent_buffers_set)
        self._link()
        self.training = train.training
        signature = vars(train).get("__signature__")
        if signature is not None:
            _compat.sign(self, signature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program of the present mode on the inputs that the model was exported with."""
        return self._programs[self.training](*args, **kwargs)

    def program(self, training: bool) -> fx.GraphModule:
        """The bound program of a mode; its submodules, parameters and buffers are this module's own."""
        return self._programs[training]

    def follow(self, names: Collection[str]) -> None:
        """Has submodules warn when they are put into another mode than the root's, which decides about them here."""
        for name in sorted(filter(None, names)):
            module = dict(self.named_modules(remove_duplicate=False)).get(name) or _added(self, name)
            if type(module) is nn.Module:
                module.__class__ = Follower
                module.__dict__["_follows"] = (self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":  # which is the mode of the sites that the root owns
            for program in self.__dict__.get("_programs", {}).values():
                program.training = value

    def _copied(self, memo: dict[int, Any]) -> "DualModule":
        copied: DualModule = nn.Module.__new__(type(self))
        memo[id(self)] = copied
        state = {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied._compiled_call_impl = None
        copied._link()
        return copied

    __deepcopy__ = Copying(_copied)

    def _link(self) -> None:
        """Lets the programs have this module's submodules and state, also when those are replaced later."""
        for program in self._programs.values():
            constants = {name: t for name, t in program._buffers.items() if name not in self._buffers}
            program.__dict__.update(constants)  # GraphModule's deepcopy makes buffers of them
            program._modules.update(self._modules)
            program._parameters, program._buffers = self._parameters, self._buffers
            program._non_persistent_buffers_set = self._non_persistent_buffers_set


def _added(root: DualModule, name: str) -> nn.Module | None:
    """A submodule that no program has; None if the name is taken by something else."""
    path, _, leaf = name.rpartition(".")
    parent = (root.get_submodule(path) if path in dict(root.named_modules()) else _added(root, path)) if path else root
    if parent is None or hasattr(parent, leaf):
        return None
    parent.add_module(leaf, nn.Module())
    root._link()
    return parent.get_submodule(leaf)


class Follower(nn.Module):
    """A submodule by whose mode Python decides in the eager model, and the root decides here."""

    _follows: tuple[nn.Module, str]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and value is not self._follows[0].training:
            root = "eval" if value else "train"
            messages.FOLLOWS_ROOT.warn(module=self._follows[1], mode=root)


def share(train: nn.Module, evaluation: nn.Module) -> None:
    """Makes the submodules of one program those of the other, in place; each keeps what only it runs."""
    for name in sorted({*train._modules, *evaluation._modules}):
        one, other = train._modules.get(name), evaluation._modules.get(name)
        if any(m is not None and _private(name, m) for m in (one, other)):
            continue
        if one is None or other is None:
            train._modules[name] = evaluation._modules[name] = one or other
        elif one is not other:
            _merge(one, other)
            share(one, other)
            evaluation._modules[name] = one


def _merge(one: nn.Module, other: nn.Module) -> None:
    """Gives a submodule the parameters and buffers that only the other program's has."""
    for name, parameter in other._parameters.items():
        one._parameters.setdefault(name, parameter)
    for name, buffer in other._buffers.items():
        if name not in one._buffers:
            one.register_buffer(name, buffer, persistent=name not in other._non_persistent_buffers_set)


def _private(name: str, module: nn.Module) -> bool:
    """Whether a child of a program is a part of its graph: the body of a region, or the check of its inputs."""
    return isinstance(module, fx.GraphModule) or name == "_guards_fn"
