"""One graph in the deploy form: its stock form, its frozen form once it pays, and which of them a call runs."""

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from compile_modes import logs, messages
from compile_modes._compat import freezing
from compile_modes.errors import summary
from compile_modes.forms.deploy.agreement import disagreement
from compile_modes.forms.deploy.norms import into_convolutions
from compile_modes.forms.deploy.recipe import Recipe, Slot

Picking = Callable[[Sequence[Any]], Sequence[Any]]
_BEFORE = 64  # parameter sets that have been seen once


class Graph:
    """What all parameter sets of a graph share: the code, without constants, and how to compute those.

    Attributes:
        stock: the graph as it is compiled without the option.
        weights: picks them out of the inputs.
        declined: whether the frozen form can't be had.
    """

    def __init__(
        self, source: fx.GraphModule, weights: Sequence[int], stock: Callable[..., Any], patches: Mapping[str, Any]
    ) -> None:
        count = len(source.graph.find_nodes(op="placeholder"))
        self.stock = stock
        self.weights = _picking(weights)
        self._inputs = _picking([index for index in range(count) if index not in set(weights)])
        self._source: fx.GraphModule | None = source
        self._positions, self._patches = weights, patches
        self._frozen: freezing.Frozen | None = None
        self._slots: dict[str, Slot] = {}
        self._recipe = Recipe([])
        self._lock = threading.Lock()
        self._current = threading.local()
        self.declined = False

    @property
    def frozen(self) -> bool:
        """Whether the frozen form is compiled."""
        return self._frozen is not None

    def run(self, view: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Runs the frozen form on one set of constants."""
        assert self._frozen is not None
        return self._run(self._frozen, view, args)

    def freeze(self, args: Sequence[Any]) -> None:
        """Compiles the frozen form, unless someone is at it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self.frozen and not self.declined:
                self._freeze(args)
        except Exception as error:  # Inductor's own, of any kind
            self.decline(error)
        finally:
            self._lock.release()

    def decline(self, error: Exception | str) -> None:
        """From now on, the stock form runs."""
        if not self.declined:
            self.declined, self._frozen, self._source = True, None, None
            say_not_frozen(error)

    def constants(
        self, weights: Sequence[torch.Tensor], before: Mapping[str, torch.Tensor], changed: set[int]
    ) -> dict[str, torch.Tensor]:
        """The constants of these weights.

        Args:
            weights: as they are now.
            before: constants of the same weights at another time, or none.
            changed: which of the weights have been written to since.
        """
        needed = {name: slot for name, slot in self._slots.items() if name not in before or self._needs(slot) & changed}
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            values = self._recipe.run(set(needed.values()), [weight.detach() for weight in weights])
        return {**before, **{name: values[slot] for name, slot in needed.items()}}

    def view(self, constants: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
        """The compiled code over these constants."""
        assert self._frozen is not None
        return freezing.with_constants(self._frozen.call, constants)

    def _run(self, frozen: freezing.Frozen, view: Callable[..., Any], args: Sequence[Any]) -> Any:
        self._current.view = view
        return frozen.run(*self._inputs(args))

    def _needs(self, slot: Slot) -> frozenset[int]:
        return self._recipe.needs(slot)

    def _freeze(self, args: Sequence[Any]) -> None:
        assert self._source is not None
        source, given = self._source, list(args)
        # Others may write to theirs meanwhile. By whether a weight needs a gradient, ATen chooses how to multiply.
        weights = [weight.detach().clone().requires_grad_(weight.requires_grad) for weight in self.weights(args)]
        for index, weight in zip(self._positions, weights, strict=True):
            given[index] = weight
        _hold(source, self._positions, weights)
        recipe = Recipe(weights)
        current = self._current
        frozen = freezing.freeze(source, self._inputs(args), recipe.record, lambda: current.view, self._patches)
        slots = {name: recipe.named[of] for name, of in frozen.constants.items() if of in recipe.named}
        self._recipe = recipe
        self._slots = {name: slot for name, slot in slots.items() if recipe.needs(slot)}
        self._try_out(frozen, given)
        recipe.forget_weights()
        frozen.forget(self._slots)
        self._frozen, self._source = frozen, None
        logs.logger.info("a graph is frozen: %d constants of %d weights", len(self._slots), len(weights))

    def _try_out(self, frozen: freezing.Frozen, args: Sequence[Any]) -> None:
        """Computes constants and outputs, and compares them with what Inductor has folded, and with the stock form."""
        constants = self.constants(self.weights(args), {}, set())
        for name, value in constants.items():
            if why := disagreement(frozen.call.__globals__[name], value, tolerance=0.0):
                raise freezing.Unfrozen(f"{name} can't be computed again: {why}")
        expected = self.stock(*args)
        given = self._run(frozen, freezing.with_constants(frozen.call, constants), args)
        for one, other in zip(expected, given, strict=True):
            if why := disagreement(one, other, tolerance=None):
                raise freezing.Unfrozen(f"frozen outputs differ: {why}")


def say_not_frozen(error: Exception | str) -> None:
    """Warns, once, that a graph stays in its stock form."""
    text = error if isinstance(error, str) else summary(error)
    messages.NOT_FROZEN.warn_once(error=text)


def _hold(graph: fx.GraphModule, positions: Sequence[int], weights: Sequence[torch.Tensor]) -> None:
    """Makes attributes of the inputs that are weights, and leaves out what Dynamo has noted on its own fake tensors."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    into_convolutions(graph.graph, {placeholders[index] for index in positions})
    for body in graph.modules():
        for node in body.graph.nodes if isinstance(body, fx.GraphModule) else ():
            node.meta = {}
    for number, (index, weight) in enumerate(zip(positions, weights, strict=True)):
        name = f"weight_{number}"
        graph.register_buffer(name, weight)
        with graph.graph.inserting_before(placeholders[index]):
            placeholders[index].replace_all_uses_with(graph.graph.get_attr(name))
        graph.graph.erase_node(placeholders[index])
    graph.recompile()


def _picking(indices: Sequence[int]) -> Picking:
    if len(indices) < 2:
        return lambda args: tuple(args[index] for index in indices)
    return operator.itemgetter(*indices)
