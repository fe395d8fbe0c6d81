"""``warmup``: compile all modes before they are needed, and leave no other trace."""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from compile_modes import messages
from compile_modes._compat.cache import is_compiled
from compile_modes._compat.frames import graphs_compiled
from compile_modes.console import progress as progress_bar
from compile_modes.errors import CompileModesError, summary
from compile_modes.exported.observing import plain
from compile_modes.forms.deploy.running import CALLS, DEPLOYED
from compile_modes.graph.followed import leaves
from compile_modes.graph.requests import MODES, check_overrides, owner_matches
from compile_modes.graph.snapshot import Snapshot
from compile_modes.warming.background import Warmup, start

Mode = str | Mapping[str, str]
Grad = bool | str  # True, False or "inference"
_GRADS: tuple[Grad, ...] = (True, False, "inference")
_DEFAULT_GRADS: dict[bool, tuple[Grad, ...]] = {True: (True,), False: (False,)}


Modes = Mode | Sequence[Mode]
Grads = Grad | Sequence[Grad] | Mapping[str, Grad | Sequence[Grad]]


@overload
def warmup(
    module: nn.Module,
    *args: Any,
    modes: Modes | None = None,
    grad: Grads | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    background: Literal[False] = False,
) -> int: ...


@overload
def warmup(
    module: nn.Module,
    *args: Any,
    modes: Modes | None = None,
    grad: Grads | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    background: Literal[True],
) -> Warmup: ...


def warmup(
    module: nn.Module,
    *args: Any,
    modes: Modes | None = None,
    grad: Grads | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    background: bool = False,
) -> int | Warmup:
    """Compiles a compiled module in all the modes that it will be used in, so that no later call stalls.

    The module is called once per mode and grad mode, under the ambient autocast; with grad, a backward pass through
    all its outputs follows, for backward graphs are compiled when they are first needed. No gradient is accumulated
    for that: hooks on the accumulation (DDP's reduction, optimizers in backward) do not run. Only ``fully_shard``,
    which needs them, gets a real ``backward()``.

    Afterwards everything is as before, also if a call raises: parameters, buffers, ``.grad`` and the tensors among the
    arguments, by identity and by value; each submodule's ``training``; the generators of torch (CPU and CUDA), Python
    and NumPy. That takes memory for one more copy of these tensors meanwhile. Not restored, for no one can list it:
    Python state and tensors that forward keeps elsewhere, and whatever hooks of yours do, which run.

    Calls with other shapes or dtypes, under other autocast settings, or with inputs that require grad where these
    don't, compile again.

    In the background, a child process of low priority warms up a copy instead, with one compiler at a time. Its code
    goes into torch's cache on disk when all of it is complete, and the first call here finds it there: what remains
    to be done then is Dynamo's tracing. The module, its classes and the arguments must be such that Python's pickle can
    take them to another process, by names that can be imported there: nothing of ``__main__``.

    Args:
        module: an ``OptimizedModule``, a module compiled in place, or one that contains such modules; any backend.
        args: what it will be called with.
        modes: ``"train"`` and ``"eval"`` call ``train()`` and ``eval()``; ``"current"`` keeps the flags as they are;
            a mapping ``{glob of names in named_modules(): "train" | "eval"}`` changes the flags of the modules that it
            names (first match wins; ``""`` is the root, and ``"layer1"`` does not reach below itself). Frozen layers in
            training are ``{"layer1*": "eval", "*": "train"}``. None stands for both; in the background, for the one of
            them that ``module`` isn't in, since the caller is about to compile the other.
        grad: which grad modes to compile: True, False (``no_grad``), ``"inference"`` (``inference_mode``), several of
            them, or a mapping of ``"train"`` and ``"eval"``, the mode of the root, to these. None stands for
            ``{"train": True, "eval": False}``.
        kwargs: keyword arguments of the call.
        progress: whether to show a progress bar on a terminal, if rich is installed.
        background: whether to leave it to a child process, and to return at once.

    Returns:
        How many graphs were compiled; in the background, a :class:`compile_modes.Warmup`.

    Raises:
        WarmupError: nothing in ``module`` is compiled, its parameters are not initialised yet, or a call raised; or it
            can't be taken to another process.
        OptionError: ``modes`` or ``grad`` is not usable.
        OverrideError: a glob matches no module.

    Warns:
        ModeWarning: the warm-up in the background has failed, with the reason.
    """
    _check(module)
    if modes is None:
        modes = tuple(mode for mode, training in MODES.items() if not background or training != module.training)
    steps = _steps(module, modes, grad)
    if background:
        return start(module, args, {"modes": modes, "grad": grad, "kwargs": kwargs})
    before = graphs_compiled()
    snapshot = Snapshot(module, (args, kwargs))

    def restore() -> None:
        for sharded in _sharded(module):
            sharded.reshard()  # the root stays whole after forward
        snapshot.restore()

    try:
        with progress_bar("warm-up", [step.title for step in steps], progress) as advance:
            for step in steps:
                _set_modes(module, step.mode)
                _run(module, step, args, kwargs or {})
                for _ in range(1, CALLS):  # with ``freeze``, the last of so many calls compiles once more
                    if step.grad is not True and any(deployed.waiting for deployed in list(DEPLOYED)):
                        _run(module, step, args, kwargs or {})
                restore()
                advance()
    finally:
        restore()
    return graphs_compiled() - before


@dataclass(frozen=True)
class _Step:
    mode: Mode
    grad: Grad

    @property
    def title(self) -> str:
        mode = (
            self.mode
            if isinstance(self.mode, str)
            else ", ".join(f"{k or '(root)'}: {v}" for k, v in self.mode.items())
        )
        return mode + {True: "", False: ", no_grad", "inference": ", inference_mode"}[self.grad]


def _steps(module: nn.Module, modes: Any, grad: Any) -> list[_Step]:
    """Validates everything that can be before a module is touched."""
    modes = [modes] if isinstance(modes, str | Mapping) else modes
    if not isinstance(modes, Sequence) or not modes:
        raise messages.NOT_MODES.error(modes=modes)
    if isinstance(grad, Mapping) and not grad.keys() <= MODES.keys():
        raise messages.GRAD_KEYS.error(keys=list(grad))
    return [
        _Step(mode, wanted)
        for i, mode in enumerate(modes)
        for wanted in _grads(grad, _checked_mode(module, mode, f"modes[{i}]"))
    ]


def _checked_mode(module: nn.Module, mode: Any, where: str) -> bool:
    """The root's mode in one entry of ``modes``."""
    if isinstance(mode, str) and mode in (*MODES, "current"):
        return MODES.get(mode, module.training)
    if not isinstance(mode, Mapping):
        raise messages.NOT_A_STEP.error(mode=mode, where=where)
    check_overrides(None, mode, where)
    names = list(dict.fromkeys(name for name, _ in _named_modules(module)))
    for pattern in mode:
        if not any(owner_matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[1:4]
            if not near:
                raise messages.NO_SUBMODULES.error(pattern=pattern, where=where)
            raise messages.NO_SUCH_MODULE.error(pattern=pattern, where=where, names=", ".join(map(repr, near)))
    return _asked(mode, "", module.training)


def _grads(grad: Any, training: bool) -> Sequence[Grad]:
    if isinstance(grad, Mapping):
        grad = grad.get("train" if training else "eval")
    if grad is None:
        return _DEFAULT_GRADS[training]
    wanted = [grad] if isinstance(grad, bool | str) else grad
    if (
        not isinstance(wanted, Sequence)
        or not wanted
        or not all(isinstance(g, bool | str) and g in _GRADS for g in wanted)
    ):
        raise messages.NOT_A_GRAD.error(grad=grad)
    return wanted


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Module) or not any(is_compiled(m) for m in module.modules()):
        raise messages.NOT_COMPILED_YET.error(kind=type(module).__name__)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise messages.LAZY.error(name=name)


def _named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names as the user knows them, without what torch.compile wraps around modules."""
    for name, submodule in module.named_modules():
        yield plain(name), submodule


def _set_modes(module: nn.Module, mode: Mode) -> None:
    if mode in ("train", "eval"):
        module.train(mode == "train")  # which a class may override, to keep its batch norms in eval
    elif isinstance(mode, Mapping):
        for name, submodule in _named_modules(module):
            submodule.training = _asked(mode, name, submodule.training)


def _asked(mode: Mapping[str, str], name: str, otherwise: bool) -> bool:
    return next((MODES[m] for pattern, m in mode.items() if owner_matches(name, pattern)), otherwise)


def _run(module: nn.Module, step: _Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(step.grad == "inference"), torch.set_grad_enabled(step.grad is True):
            own_args, own_kwargs = pytree.tree_map(_cut_off, (tuple(args), dict(kwargs)))
            outputs = module(*own_args, **own_kwargs)
            if step.grad is True:
                _differentiate(outputs, accumulate=bool(_sharded(module)))
    except CompileModesError:
        raise
    except Exception as error:  # whatever the user's model, its hooks or a compiler raises
        raise messages.CALL_FAILED.error(error=summary(error), mode=step.title) from error


def _cut_off(value: Any) -> Any:
    """The very tensor, for Dynamo guards on layout and aliases; its history, which is the caller's, is left alone."""
    if isinstance(value, torch.Tensor) and value.grad_fn is not None:
        return value.detach().requires_grad_()
    return value


def _sharded(module: nn.Module) -> list[Any]:
    """The modules to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # or else it was not
    return [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp is not None else []


def _differentiate(outputs: Any, accumulate: bool) -> None:
    """Runs backward from all outputs to all leaves, without accumulating into ``.grad`` unless ``accumulate``."""
    roots = [t for t in _tensors(outputs) if t.requires_grad]
    found = leaves(roots)
    ones = [torch.ones_like(t) for t in roots]
    if accumulate:  # fully_shard puts parameters away when their gradients arrive
        torch.autograd.backward(roots, ones)
    elif found:
        torch.autograd.grad(roots, found, ones, allow_unused=True)


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    for value in pytree.tree_leaves(outputs):
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
