"""What a trainer's callback compiles, and how both modes are warmed up from the first call that training makes."""

import difflib
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compile_modes import messages
from compile_modes._compat import first_calls
from compile_modes._compat.cache import is_compiled
from compile_modes.errors import WarmupError, first_line
from compile_modes.integrations.phases import Phases
from compile_modes.warming.warmup import warmup

_TAKEN = tuple(name for name in inspect.signature(torch.compile).parameters if name != "model")


class Compiling:
    """Compiles modules in place, and warms up each when it is first called.

    A call in train mode warms up train as its flags stand, and eval; a call in eval mode, eval alone. What the warm-up
    calls with are copies of that call's arguments, so that shapes, autocast and devices are those of the training.

    Args:
        modules: names of what is compiled; None leaves the choice to the trainer's callback.
        warm: whether to warm up.
        dynamic_batch: whether code takes any batch size of at least two from the start.
        options: keyword arguments of ``torch.compile``.
        train_only: keyword arguments that the trainer passes in training alone.

    Attributes:
        phases: graphs and stalls, loop by loop.

    Raises:
        OptionError: ``options`` has a name that ``torch.compile`` doesn't take.
    """

    def __init__(
        self,
        modules: Sequence[str] | None,
        *,
        warm: bool,
        dynamic_batch: bool,
        options: Mapping[str, Any],
        train_only: Sequence[str] = (),
    ) -> None:
        for name in options:
            if name not in _TAKEN:
                near = difflib.get_close_matches(name, _TAKEN) or _TAKEN
                raise messages.NOT_A_COMPILE_OPTION.error(name=name, near=", ".join(near))
        self.modules = [modules] if isinstance(modules, str) else modules
        self.warm, self.dynamic_batch, self.options = warm, dynamic_batch, dict(options)
        self.train_only = train_only
        self.phases = Phases()
        self._uncalled: set[str] = set()
        self._done: set[tuple[int, bool]] = set()

    def ensure(self, model: nn.Module, choose: Callable[[nn.Module], Iterable[str]]) -> None:
        """Compiles what was named, or else what ``choose`` names, unless that was done before.

        Args:
            model: the trainer's model.
            choose: gives names of modules in ``model``; ``""`` is the model itself.

        Raises:
            OptionError: a name is not there or lies in another, there is nothing to compile, or the model has been
                wrapped by ``torch.compile``.
        """
        chosen = self._chosen(model, choose)
        fresh = {name: module for name, module in chosen.items() if not is_compiled(module)}
        for module in fresh.values():
            module.compile(**self.options)
        for name, module in fresh.items():
            self._uncalled.add(name or type(module).__name__)
            first_calls.intercept(module, self._first_call(name))

    def check_called(self) -> None:
        """To be asked after a loop.

        Warns:
            ModeWarning: what was compiled has not been called.
        """
        if self._uncalled:
            messages.NEVER_CALLED.warn(names=", ".join(map(repr, sorted(self._uncalled))))
            self._uncalled.clear()

    def _chosen(self, model: nn.Module, choose: Callable[[nn.Module], Iterable[str]]) -> dict[str, nn.Module]:
        names = list(self.modules if self.modules is not None else choose(model))
        if not names:
            raise messages.NOTHING_TO_COMPILE.error(kind=type(model).__name__)
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if n][:3]
                raise messages.NO_SUCH_CHILD.error(name=name, names=", ".join(map(repr, near)))
            if first_calls.is_wrapper(known[name]):
                raise messages.WRAPPED_BEFORE.error(kind=type(known[name]).__name__, name=name or "model")
            for outer in names:
                if name != outer and (not outer or name.startswith(outer + ".")):
                    raise messages.ONE_IN_ANOTHER.error(inner=name, outer=outer)
        return {name: known[name] for name in names}

    def _first_call(self, name: str) -> Callable[..., Any]:
        """What runs in the place of the compiled calls of the named module, until train has been warmed up."""

        def before(module: nn.Module, call: first_calls.Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._uncalled.discard(name or type(module).__name__)
            training = module.training
            intercepted = first_calls.compiled_call(module)
            first_calls.put_back(module, call)
            try:
                if self.warm and (id(module), training) not in self._done:
                    self._warm_up(name, module, args, kwargs)
            finally:
                if not training:  # train is still to come
                    first_calls.put_back(module, intercepted)
            return call(*args, **kwargs)

        return before

    def _warm_up(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        started, training, grad = time.perf_counter(), module.training, torch.is_grad_enabled()
        graphs = self._call(module, "current", grad if training else self._grad_here(grad), args, kwargs)
        self._done.add((id(module), training))
        if training and (id(module), False) not in self._done:
            self._done.add((id(module), False))
            kwargs = {key: value for key, value in kwargs.items() if key not in self.train_only}
            try:
                graphs += self._call(module, "eval", False, args, kwargs)
            except WarmupError as error:
                messages.EVAL_NOT_WARM.warn(error=first_line(error), name=name or type(module).__name__)
        self.phases.warm_up(graphs, time.perf_counter() - started)

    @staticmethod
    def _grad_here(grad: bool) -> bool | str:
        return "inference" if torch.is_inference_mode_enabled() else grad

    def _call(self, module: nn.Module, mode: str, grad: bool | str, args: Any, kwargs: Any) -> int:
        """Warms up once, and again if something was compiled.

        Some models settle something in their first call (transformers' ``config.problem_type``), which the graph of
        that call is guarded on: only the second has a graph that stays.
        """
        first = self._warmed(module, mode, grad, args, kwargs)
        return first + (self._warmed(module, mode, grad, args, kwargs) if first else 0)

    def _warmed(self, module: nn.Module, mode: str, grad: bool | str, args: Any, kwargs: Any) -> int:
        with torch.inference_mode(False):
            args, kwargs = self._copies((args, kwargs), grad)
            return warmup(module, *args, modes=mode, grad=grad, kwargs=kwargs, progress=False)

    def _copies(self, arguments: Any, grad: bool | str) -> Any:
        """The arguments of a call with copies of their tensors; one that is there twice is copied once.

        Dynamo guards on what tensors require, and on whether they were made in inference mode.
        """
        copies: dict[int, torch.Tensor] = {}
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
        batch = next((t.shape[0] for t in tensors if t.ndim), 0)

        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in copies:
                with torch.inference_mode(value.is_inference()):
                    made = value.detach().clone()
                if value.requires_grad and grad is True:
                    made.requires_grad_()
                if self.dynamic_batch and made.ndim and made.shape[0] == batch > 1:
                    first_calls.may_vary(made)
                copies[id(value)] = made
            return copies[id(value)]

        return pytree.tree_map(copy, arguments)
