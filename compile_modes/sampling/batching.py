"""Runs the second part of a graph for many repetitions at once, or one after the other."""

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.func import vmap
from torch.utils import _pytree as pytree

from compile_modes.graph.owners import module_path
from compile_modes.graph.snapshot import keeping_generators
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
    own, drawn = parts.own, parts.drawn
    second = parts.second.forward if isinstance(parts.second, fx.GraphModule) else parts.second

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


def quiet(run: Callable[..., Results]) -> Callable[..., Results]:
    """The same function, without vmap's word for slow ops."""

    def quietly(*args: Any) -> Results:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_SLOW)
            return run(*args)

    return quietly


class _Watched(fx.Interpreter):
    """Runs a graph and knows which node it is at, and the dtypes and shapes of all before.

    Args:
        second: the graph.
        single: these of one repetition by itself, with which others are compared.
    """

    at: fx.Node | None = None

    def __init__(self, second: fx.GraphModule, single: "_Watched | None" = None) -> None:
        super().__init__(second)
        self.seen: dict[fx.Node, Any] = {}
        self._single = single

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        result = super().run_node(n)
        self.seen[n] = [(t.dtype, t.shape) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if self._single is not None and self._single.seen[n] != self.seen[n]:
            raise RuntimeError(f"{self.seen[n]} with vmap, {self._single.seen[n]} without")
        return result


@dataclass(frozen=True)
class Trial:
    """What two repetitions at once have shown.

    Attributes:
        error: why it doesn't work, if it doesn't; then ``op`` and ``owner`` say where.
        slow: whether vmap has had a word to say.
    """

    error: Exception | None = None
    op: str = ""
    owner: str = ""
    slow: bool = False


def tried(parts: Parts, crossing: Sequence[Any]) -> Trial:
    """Runs one repetition, and two at once, to see whether that works and gives the same shapes and dtypes."""
    single = _Watched(parts.second)
    watched = _Watched(parts.second, single)
    alone, trial = (replace(parts, second=cast(fx.GraphModule, w.run)) for w in (single, watched))
    with torch.no_grad(), keeping_generators():
        one_by_one(alone)(torch.ones(1, dtype=torch.bool), *crossing)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                at_once(trial)(torch.ones(2, dtype=torch.bool), *crossing)
            except RuntimeError as error:  # what vmap raises, for ops without a rule and for those that can't have one
                node = watched.at
                assert node is not None
                op = node.target if isinstance(node.target, OpOverload | str) else getattr(node.target, "__name__", "")
                return Trial(error, str(op), module_path(node))
    return Trial(slow=any(str(warning.message).startswith(_SLOW) for warning in said))
