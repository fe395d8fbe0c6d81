"""Runs the second part of a graph for many repetitions at once, or one after the other."""

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap

from compile_modes.graph.owners import module_path
from compile_modes.sampling.splitting import Parts

Results = Sequence[Tensor]
# vmap's word for an op that it runs once per repetition, which is right, and slow.
_SLOW = "There is a performance drop because we have not yet implemented the batching rule"


def at_once(parts: Parts) -> Callable[..., Results]:
    """A function of how many repetitions (a boolean tensor of that length) and the crossing values.

    It runs the second part under ``torch.func.vmap``, whose rules say of each op what it does for a batch of calls: a
    softmax over the batch, say, stays within its repetition. Each repetition draws its own random numbers. Values that
    random numbers are drawn for have one view per repetition, and those that are written to one copy.

    The function has code of its own, for Dynamo counts what it has compiled by code.
    """
    in_dims = (0, *(0 if own or drawn else None for own, drawn in zip(parts.own, parts.drawn, strict=True)))
    second, own, drawn = parts.second, parts.own, parts.drawn

    def run(repetitions: Tensor, *crossing: Any) -> Any:
        values = list(crossing)
        for i, value in enumerate(crossing):
            if own[i]:
                values[i] = value.expand(len(repetitions), *value.shape).clone()
            elif drawn[i]:
                values[i] = value.expand(len(repetitions), *value.shape)
        return vmap(second, in_dims, randomness="different")(repetitions, *values)

    code = run.__code__.replace()
    return types.FunctionType(code, run.__globals__, run.__name__, run.__defaults__, run.__closure__)


def one_by_one(parts: Parts) -> Callable[..., Results]:
    """The same function, but it runs the second part once per repetition."""

    def run(repetitions: Tensor, *crossing: Any) -> Results:
        results = []
        for repetition in repetitions:
            values = [v.clone() if own else v for v, own in zip(crossing, parts.own, strict=True)]
            results.append(parts.second(repetition, *values))
        return [torch.stack(values) for values in zip(*results, strict=True)]

    return run


def quietly(run: Callable[..., Results], *args: Any) -> Results:
    """Runs it, without vmap's word for slow ops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SLOW)
        return run(*args)


class _Watched(fx.Interpreter):
    """Runs a graph and knows which node it is at."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def obstacle(parts: Parts, crossing: Sequence[Any]) -> tuple[str, str, Exception] | None:
    """Runs two repetitions at once, to see whether that works.

    Returns:
        None if it does; otherwise the op that doesn't, its owner, and what it raised.
    """
    watched = _Watched(parts.second)
    trial = Parts(parts.first, watched.run, parts.own, parts.drawn, parts.outputs)  # type: ignore[arg-type]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            quietly(at_once(trial), torch.ones(2, dtype=torch.bool), *crossing)
    except RuntimeError as error:  # what vmap raises, for ops without a rule and for those that can't have one
        node = watched.at
        assert node is not None
        return str(node.target), module_path(node), error
    return None
