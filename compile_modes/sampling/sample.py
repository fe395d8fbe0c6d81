"""``sample``: many stochastic passes of a module, the deterministic part of it once."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compile_modes import messages
from compile_modes.graph.snapshot import seeded
from compile_modes.sampling.looping import loop
from compile_modes.sampling.plans import Plan, plan_for
from compile_modes.sampling.reducing import Reduction, reduction


def sample(
    module: nn.Module,
    *args: Any,
    n: int = 30,
    which: Sequence[str] = ("*",),
    reduce: Literal["mean_std"] | Callable[[Any, Any], Any] | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Calls a module many times with live dropout, and everything else in eval: MC dropout, and its kin.

    What draws random numbers in train is in train: dropout of all kinds, also in attention and between recurrent
    layers, RReLU, random masks such as stochastic depth. Norms and all else are in eval, whatever the module's flags,
    which stay as they are; no buffer is written. What comes before the first random number is computed once. The rest
    runs for ``chunk`` repetitions at once (``torch.func.vmap``), each with random numbers of its own. The results are
    distributed as those of single calls; gradients flow as they do there.

    The first call for inputs of a kind takes longer: it finds what is stochastic by running the module in a few modes,
    exports it, and keeps the graph. That graph reads parameters and buffers as they are at each call, and is made anew
    when something else of the module has changed: a submodule, a probability, a hook. Where the module is compiled, the
    two parts are compiled with the same settings.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    >>> sample(model, torch.ones(3, 4), n=10).shape
    torch.Size([10, 3, 2])

    Args:
        module: eager, bound, or compiled by ``torch.compile(module)`` or ``module.compile()``.
        args: what to call it with.
        n: how many repetitions.
        which: globs of names of modules: only those of them that draw random numbers in train are put into train.
        reduce: None for all results. ``"mean_std"`` for their mean and standard deviation (with n - 1), without all
            results in memory. A function ``(state, output) -> state``, as for :func:`functools.reduce`, is called with
            the output of each repetition in turn; state is None at first.
        seed: with one, calls draw the same random numbers each time (with the same ``n`` and ``chunk``), and the
            generators of torch, Python and NumPy are left as they were.
        chunk: how many repetitions run at once; None is all of them. Memory grows with it.
        kwargs: keyword arguments of the call.

    Returns:
        What the module returns, each tensor with a first dimension more: (n, batch, ...). With ``"mean_std"``, two such
        structures with tensors of the module's own shapes; with a function, its last result.

    Raises:
        OptionError: ``n``, ``chunk``, ``which``, ``seed`` or ``reduce`` is not usable.
        OverrideError: a glob names no module that draws random numbers.
        SampleError: nothing draws random numbers; or a module does more in train than that.

    Warns:
        ModeWarning: no graph can be made of the module, so that it is called n times; or the graph has an op that can't
            run for several repetitions at once, and the part with it runs n times.
    """
    patterns = _check(module, n, which, chunk, seed)
    into = reduction(reduce, n)
    kwargs = dict(sorted((kwargs or {}).items()))
    plan = plan_for(module, args, kwargs, patterns)
    leaves = pytree.tree_leaves((args, kwargs))
    with contextlib.nullcontext() if seed is None else seeded(seed):
        if plan.parts is None:
            for results, spec in loop(module, args, kwargs, plan.live, n):
                into.add(results, spec)
        else:
            _run(plan, leaves, n, min(chunk or n, n), into)
    return into.result()


def _run(plan: Plan, leaves: Sequence[Any], n: int, chunk: int, into: Reduction) -> None:
    """Runs the first part, and the second for each chunk."""
    assert plan.parts is not None
    assert plan.first is not None
    assert plan.second is not None
    computed = plan.first(*leaves)
    crossing = computed[: len(plan.parts.own)]
    for start in range(0, n, chunk):
        count = min(chunk, n - start)
        results = plan.second(torch.ones(chunk if plan.whole else count, dtype=torch.bool), *crossing)
        outputs: list[Any] = []
        for kind, where in plan.parts.outputs:
            if kind == "second":
                outputs.append(results[where][:count])
            else:
                outputs.append(_repeated(computed[where], count) if kind == "first" else where)
        into.add(outputs, plan.spec)


def _repeated(value: Any, count: int) -> Any:
    return value.expand(count, *value.shape).clone() if isinstance(value, Tensor) else value


def _check(module: Any, n: Any, which: Any, chunk: Any, seed: Any) -> tuple[str, ...]:
    """Validates what can be before a module is touched; returns the globs."""
    if not isinstance(module, nn.Module):
        raise messages.NOT_SAMPLED.error(kind=type(module).__name__)
    for name, value, other in (("n", n, ""), ("chunk", chunk, ", or None for all at once")):
        if (value is not None or name == "n") and (type(value) is not int or value < 1):
            raise messages.NOT_REPETITIONS.error(name=name, value=value, other=other)
    if seed is not None and type(seed) is not int:
        raise messages.NOT_A_SEED.error(seed=seed)
    patterns = (which,) if isinstance(which, str) else which
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise messages.NOT_PATTERNS.error(which=which)
    return tuple(patterns)
