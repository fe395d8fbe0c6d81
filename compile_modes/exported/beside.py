"""Two modules run beside one another, from one state, in the same modes."""

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compile_modes import _compat, messages
from compile_modes._compat.cache import is_compiled, raised_limits
from compile_modes.errors import ModeWarning, few, first_line, summary
from compile_modes.exported.comparing import Tolerance, VerifyReport, within
from compile_modes.exported.observing import CALL, DREW, Key, State, generators, observe, plain
from compile_modes.graph.snapshot import Snapshot

Modes = dict[str, bool]


def compared(
    ours: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    vectors: int,
    steps: int,
    tolerance: Tolerance,
    kept: Mapping[str, bool] | None = None,
) -> VerifyReport:
    """The report of :func:`compile_modes.verify`; raises what it raises where the two can't be compared.

    Modules in ``kept`` are in that mode throughout.
    """
    for argument, value, least in (("vectors", vectors, 0), ("steps", steps, 1)):
        if not isinstance(value, int) or value < least:
            raise messages.NOT_A_COUNT.error(argument=argument, value=value, least=least)
    _check(ours, model, args, kwargs)
    report = VerifyReport(steps, str(tolerance))
    pair = _Pair(ours, model, (args, dict(kwargs)))
    try:
        start = pair.start
        own = dict(State.of(pair.inner).values(start))
        report.compare({CALL: None, **start}, {CALL: None, **start, **own}, {}, 0, tolerance)
        for number, modes in enumerate(_mode_vectors(model, pair.inner, vectors)):
            pair.compare(report, modes | {n: m for n, m in (kept or {}).items() if n in modes}, number, tolerance)
    finally:
        model.train(pair.mode)  # for models whose train() does more than set flags
        pair.restore()
    if not report.vectors:
        raise messages.NOTHING_COMPARED.error(left_out="\n".join(f"  {why}" for why in report.left_out))
    return report


class _Pair:
    """A module and its model, which are put back before each is called."""

    def __init__(self, ours: nn.Module, model: nn.Module, inputs: Any) -> None:
        self.ours, self.model, self.inputs = ours, model, inputs
        self.inner: nn.Module = getattr(ours, "_orig_mod", ours)
        self.mode = model.training
        self.start = dict(State.of(model).values({}))
        self._snapshots = [Snapshot(model), Snapshot(ours)]
        self._compiled = any(is_compiled(m) for m in ours.modules())

    def restore(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ModeWarning)  # of modes that they were in
            for snapshot in self._snapshots:
                snapshot.restore()

    def compare(self, report: VerifyReport, modes: Modes, number: int, tolerance: Tolerance) -> None:
        """Adds the calls in one mode vector to a report."""
        self.restore()
        if refused := self._set_modes_of_ours(modes):
            report.left_out.append(refused)
            return
        seeds = [1000 * (number + 1) + step for step in range(report.steps)]
        self.restore()
        self.model.train(modes[""])
        for name, module in self.model.named_modules():
            module.training = within(modes, plain(name))
        with torch.inference_mode(False), torch.enable_grad(), _eager(self.model):
            expected = self._calls(self.model, self.model, seeds)
        if (error := expected[-1][CALL]) is not None:
            failed = summary(error)
            if len(set(modes.values())) == 1:
                mode = "train" if modes[""] else "eval"
                raise messages.MODEL_FAILS.error(kind=type(self.model).__name__, mode=mode, error=failed) from error
            report.left_out.append(f"the model itself fails: {failed}")
            return
        self.restore()
        self._set_modes_of_ours(modes)
        with torch.inference_mode(False), torch.enable_grad(), raised_limits(number + 1):
            found = self._calls(self.ours, self.inner, seeds)
        report.vectors += 1
        for call, (eager, own) in enumerate(zip(expected, found, strict=False)):
            if self._draws_its_own(eager, own):
                report.left_out.append("from a call on that draws random numbers of Inductor's own, unlike eager's")
                break
            if own[CALL] is None:
                own = {**self.start, **own}  # which may lack a buffer that nothing reads
            report.compare(eager, own, modes, call + 1, tolerance)

    def _calls(self, call: Callable[..., Any], module: nn.Module, seeds: list[int]) -> list[dict[Key, Any]]:
        """Calls one after the other, up to the first that raises."""
        seen = []
        for seed in seeds:
            seen.append(observe(call, module, self.inputs, seed, self.start))
            if seen[-1][CALL] is not None:
                break
        return seen

    def _draws_its_own(self, eager: Mapping[Key, Any], own: Mapping[Key, Any]) -> bool:
        if not self._compiled or _compat.draws_as_eager() or own[CALL] is not None or not eager[DREW]:
            return False
        return any(not torch.equal(eager[key], own[key]) for key in generators())

    def _set_modes_of_ours(self, modes: Modes) -> str:
        """Sets flags as ``train()`` and ``eval()`` do, of outer modules first; says so if the module doesn't follow."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ModeWarning)
            for name, module in self.inner.named_modules(remove_duplicate=False):
                if plain(name) in modes:
                    _check_modes(module)
                    for below in module.modules():  # not by train(), which may do more
                        below.training = modes[plain(name)]
        warned = [w.message for w in caught if isinstance(w.message, ModeWarning)]
        return f"a submodule does not follow its own mode there ({warned[0].code})" if warned else ""


def _check_modes(module: nn.Module) -> None:
    """Raises VerifyError for an exported module that is not bound, and for a baked one: their ``train()`` raises."""
    forbidden = vars(module).get("train")
    if forbidden is not None:
        try:
            forbidden(module.training)
        except Exception as error:  # NotImplementedError, BindError
            raise messages.NO_MODES.error(kind=type(module).__name__, error=first_line(error)) from error


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Has a model run as Python says, although it, or a part of it, is compiled."""
    if any(map(is_compiled, model.modules())):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _mode_vectors(model: nn.Module, ours: nn.Module, count: int) -> Iterator[Modes]:
    """Train, eval, and random modes of the modules that both have; those of one module are one under all its names."""
    present = {plain(name) for name, _ in ours.named_modules(remove_duplicate=False)}
    modules = {plain(name): m for name, m in model.named_modules(remove_duplicate=False)}
    names = [name for name in modules if name in present]
    yield dict.fromkeys(names, True)
    yield dict.fromkeys(names, False)
    drawn = random.Random(0)
    seen = {(True,) * len(names), (False,) * len(names)}
    for _ in range(4 * count):  # draws; few modules have few vectors
        if len(seen) == count + 2:
            return
        modes: dict[int, bool] = {}
        for module in modules.values():
            modes.setdefault(id(module), drawn.random() < 0.5)
        vector = {name: modes[id(modules[name])] for name in names}
        if (values := tuple(vector.values())) not in seen:
            seen.add(values)
            yield vector


def _check(ours: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises VerifyError where a comparison would say nothing."""
    kind, inner = type(model).__name__, getattr(ours, "_orig_mod", ours)
    if inner is model and not any(map(is_compiled, ours.modules())):
        raise messages.ONE_MODULE.error(kind=kind)
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise messages.NOT_ITS_ARGUMENTS.error(kind=kind, error="it has parameters that are not initialised yet")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise messages.NOT_ITS_ARGUMENTS.error(kind=kind, error=error) from error
    theirs, own = State.of(model), State.of(inner)
    if wrong := _unlike(theirs.parameters, own.parameters):
        raise messages.OTHER_PARAMETERS.error(names=few(wrong))
    if inner is model:
        return
    names: dict[int, list[str]] = {}
    for tensors in (theirs.parameters, theirs.buffers):
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), []).append(name)
    for name, tensor in (*own.parameters.items(), *own.buffers.items()):
        known = names.get(id(tensor), [name])
        if name not in known:
            raise messages.CROSSED.error(ours=name, theirs=known[0])


def _unlike(theirs: Mapping[str, nn.Parameter], own: Mapping[str, nn.Parameter]) -> list[str]:
    """The names that only one of the two has. Of several names of one parameter, one is enough."""
    groups: dict[int, list[str]] = {}
    for name, parameter in theirs.items():
        groups.setdefault(id(parameter), []).append(name)
    lost = [f"{names[0]} (of the model only)" for names in groups.values() if not own.keys() & set(names)]
    return lost + [f"{name} (of the module only)" for name in own if name not in theirs]
