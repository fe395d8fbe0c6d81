"""One call of a module, and all that it leaves: outputs, gradients, state, random numbers, each under a name."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Key = tuple[str, str]  # what it is, and its name

CALL: Key = ("call", "")
BACKWARD: Key = ("backward", "")
DREW: Key = ("drew", "")
STRUCTURE: Key = ("output", "structure")


@dataclass(frozen=True)
class State:
    """A module's parameters and buffers under the names that they have without ``torch.compile`` around them.

    All names of what has several.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> "State":
        """The present state; buffers may be others after a call, by assignment."""
        parameters = {plain(name): p for name, p in module.named_parameters(remove_duplicate=False)}
        return cls(parameters, {plain(name): b for name, b in module.named_buffers(remove_duplicate=False)})

    def values(self, known: Mapping[Key, Tensor]) -> Iterator[tuple[Key, Tensor]]:
        """Copies of all of it; of what has the value that is known, that one, for there may be much of it."""
        for what, tensors in (("parameter", self.parameters), ("buffer", self.buffers)):
            for name, tensor in tensors.items():
                before = known.get((what, name))
                same = before is not None and before.dtype is tensor.dtype and torch.equal(before, tensor)
                yield (what, name), before if before is not None and same else tensor.detach().clone()


def plain(name: str) -> str:
    """A name without the wrappers that ``torch.compile`` puts around modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def generators() -> dict[Key, Tensor]:
    """The states of torch's generators."""
    states = {("random numbers", "cpu"): torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {("random numbers", f"cuda:{i}"): s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def observe(
    call: Callable[..., Any], module: nn.Module, inputs: Any, seed: int, known: Mapping[Key, Tensor]
) -> dict[Key, Any]:
    """Calls a module once, with a backward pass through all of its outputs.

    Args:
        call: what is called, ``module`` or what stands for it.
        module: whose parameters and buffers are looked at.
        inputs: arguments and keyword arguments; copies are handed over, so that they stay as they are.
        seed: of the random numbers, and of the gradients of the outputs.
        known: values of parameters and buffers, of which no other copies are made.

    Returns:
        All that can be compared with another call. Beside it, under ``CALL`` and ``BACKWARD`` what these raised, None
        if nothing (there is nothing else if it was the call), and under ``DREW`` whether random numbers were drawn.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    given, passed = _copied(leaves)
    args, kwargs = pytree.tree_unflatten(passed, spec)
    _seed(seed)
    before = generators()
    try:
        output = call(*args, **kwargs)
    except Exception as error:  # whatever the model raises
        return {CALL: error}
    named, structure = pytree.tree_flatten_with_path(output)
    outputs = {pytree.keystr(path): value for path, value in named}
    seen: dict[Key, Any] = {CALL: None, STRUCTURE: structure}
    seen |= {("output", name): _kept(value) for name, value in outputs.items()}
    seen |= {
        ("requires_grad", name): value.requires_grad for name, value in outputs.items() if isinstance(value, Tensor)
    }
    names = _names(inputs)
    seen |= _gradients(outputs, State.of(module).parameters, dict(zip(names, given, strict=True)), seed)
    arguments = zip(names, passed, strict=True)
    seen |= {("argument", name): _kept(value) for name, value in arguments if isinstance(value, Tensor)}
    seen |= dict(State.of(module).values(known))
    after = generators()
    return {**seen, **after, DREW: any(not torch.equal(state, after[key]) for key, state in before.items())}


def _seed(seed: int) -> None:
    # Not torch.manual_seed, which seeds a CUDA that is not yet in use as well: for good.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def _names(inputs: Any) -> list[str]:
    args, kwargs = inputs
    at = [f"args{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(args)[0]]
    return at + [f"kwargs{pytree.keystr(path)}" for path, _ in pytree.tree_flatten_with_path(kwargs)[0]]


def _copied(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    """Copies of the tensors: those that gradients are asked of, and those to hand over. One copy of each tensor."""
    given: dict[int, Any] = {}
    passed: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in given:
            copy = given[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            passed[id(leaf)] = copy if leaf.is_leaf else copy.clone()  # which may be written in place
    return [given.get(id(leaf), leaf) for leaf in leaves], [passed.get(id(leaf), leaf) for leaf in leaves]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _gradients(
    outputs: Mapping[str, Any], parameters: Mapping[str, Tensor], inputs: Mapping[str, Any], seed: int
) -> dict[Key, Any]:
    """What a backward pass gives for each parameter and input; None where nothing arrives. No ``.grad`` is written."""
    wanted = {("gradient", name): p for name, p in parameters.items() if p.requires_grad}
    wanted |= {("gradient", n): t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    roots = {n: t for n, t in outputs.items() if isinstance(t, Tensor) and t.requires_grad}
    if not wanted or not roots:
        return {BACKWARD: None, **dict.fromkeys(wanted)}
    generator = torch.Generator().manual_seed(seed)
    # Random ones: the sum of a softmax, or of a normalised batch, has no gradient.
    starts = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in roots.values()]
    unique = {id(t): t for t in wanted.values()}
    try:
        found = torch.autograd.grad(list(roots.values()), list(unique.values()), starts, allow_unused=True)
    except RuntimeError as error:  # a value that backward needs was written over, say
        return {BACKWARD: error}
    by_tensor = dict(zip(unique, found, strict=True))
    return {BACKWARD: None, **{key: _kept(by_tensor[id(t)]) for key, t in wanted.items()}}
