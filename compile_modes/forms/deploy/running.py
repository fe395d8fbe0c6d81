"""A compiled graph under ``options={"freeze": ...}``: what its calls run."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from compile_modes._compat import freezing
from compile_modes.forms.deploy.eligible import eligibility
from compile_modes.forms.deploy.graphs import Graph, say_not_frozen
from compile_modes.forms.deploy.sets import RESTED, Constants
from compile_modes.forms.deploy.writes import WRITES, listen
from compile_modes.graph.finding import sites

Compiler = Callable[..., Callable[..., Any]]
_SEEN_ONCE = 64
CALLS = 1 + RESTED  # of one parameter set, nothing written to in between, the last of which freezes a graph
DEPLOYED: "weakref.WeakSet[Deployed]" = weakref.WeakSet()


def deploying(compile_fx: Compiler, freeze: bool | str, mode: str | None, options: Mapping[str, Any]) -> Compiler:
    """A compiler with the deploy form, for graphs that it is for; ``compile_fx`` itself without ``freeze``.

    Each graph is compiled in its stock form first. What the other compilations of this compiler write to is noted.
    """
    if not freeze:
        return compile_fx

    def compile_deployed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        listen()
        its = eligibility(gm, sites(gm), example_inputs)
        if its.why:
            say_not_frozen(its.why)
        if not its.form or its.why:
            return _noting(compile_fx(gm, example_inputs), its.written)
        source = copy.deepcopy(gm)
        stock = compile_fx(gm, example_inputs)
        return Deployed(Graph(source, its.weights, stock, freezing.settings(mode, options)), strict=freeze == "strict")

    return compile_deployed


class Deployed:
    """Runs a graph on the constants of the parameter set that it is called with.

    Dynamo runs one compilation for all modules that its guards can't tell apart: copies, repeated blocks. Constants
    live as long as all of their parameters do. A set that is met for the first time is only noted: it may be a
    passing one.
    """

    def __init__(self, graph: Graph, *, strict: bool) -> None:
        self._graph, self._strict = graph, strict
        self._sets: dict[tuple[int, ...], Constants] = {}
        self._once: dict[tuple[int, ...], None] = {}
        self._references: dict[tuple[int, ...], list[weakref.ref[torch.Tensor]]] = {}
        DEPLOYED.add(self)

    @property
    def sets(self) -> list[Constants]:
        """The parameter sets that it has been called with, those that are alive."""
        return list(self._sets.values())

    @property
    def waiting(self) -> bool:
        """Whether it has still to be frozen, in a call to come."""
        return not (self._graph.declined or self._graph.frozen)

    def __call__(self, *args: Any) -> Any:
        graph = self._graph
        if graph.declined:
            self._sets.clear()
            return graph.stock(*args)
        weights = graph.weights(args)
        constants = self._sets.get(tuple(map(id, weights)))
        if constants is None:
            constants = self._adopted(weights)
        return graph.stock(*args) if constants is None else constants(weights, args)

    def _adopted(self, weights: Sequence[torch.Tensor]) -> Constants | None:
        key = tuple(map(id, weights))
        if key not in self._once:
            if len(self._once) >= _SEEN_ONCE:
                self._once.clear()
            self._once[key] = None
            return None
        if any(type(w) not in (torch.Tensor, torch.nn.Parameter) for w in weights):
            self._graph.decline("weights are of a class of their own")
            return None
        if torch.__future__.get_swap_module_params_on_conversion():
            self._graph.decline("parameters are swapped on conversion, which torch refuses once they are watched")
            return None
        self._once.pop(key, None)
        sets, references = weakref.ref(self), []

        def drop(_: Any) -> None:
            if (its := sets()) is not None:
                its._sets.pop(key, None)
                its._references.pop(key, None)

        references = [weakref.ref(weight, drop) for weight in weights]
        constants = self._sets.setdefault(key, Constants(self._graph, weights, strict=self._strict))
        self._references[key] = references
        return constants


def _noting(compiled: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """Has runs say what they have written to."""
    if not written:
        return compiled

    def run(*args: Any) -> Any:
        tensors = [args[index] for index in written]
        WRITES.begin(tensors, tensors)
        try:
            return compiled(*args)
        finally:
            WRITES.note(tensors)
            WRITES.end(tensors)

    return run
