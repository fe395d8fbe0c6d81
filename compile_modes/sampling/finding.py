"""Which modules of a model draw random numbers in train that they don't draw in eval: found by running it."""

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compile_modes import _compat
from compile_modes._compat.readers import mode_reads
from compile_modes.exported.observing import plain
from compile_modes.exported.provenance import flags, set_flags
from compile_modes.graph.snapshot import Snapshot, generators


@dataclass(frozen=True)
class Drawing:
    """A module that draws random numbers in train.

    Attributes:
        name: by which its flag is set, the first of ``named_modules()``.
        names: all of its names, without the wrappers of ``torch.compile``.
        writes: the buffers that the model writes with this module in train, and doesn't in eval.
        outputs: what the model returns then, if that has another structure than in eval.
    """

    name: str
    names: tuple[str, ...]
    writes: tuple[str, ...] = ()
    outputs: str = ""


@dataclass(frozen=True)
class Found:
    """What is known of a model.

    Attributes:
        drawing: the modules that draw random numbers in train.
        always: whether the model draws some with all modules in eval, too.
        outputs: what it returns in eval.
    """

    drawing: tuple[Drawing, ...]
    always: bool
    outputs: str


@dataclass(frozen=True)
class _Run:
    """What a call leaves: the structure of its outputs, the buffers that it writes, the generators, what it reads."""

    outputs: str
    written: frozenset[str]
    generators: tuple[bytes, ...]
    reads: frozenset[str]


def find(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
    """Finds the modules that draw random numbers in train, and leaves everything as it was.

    Of torch's own layers, class and probability tell. Of every other module whose mode is read, a call does: the model
    is run in eval with this one module in train, and the generators are compared with those after a run in eval.

    Args:
        module: the model, not compiled.
        args, kwargs: what to call it with.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        names.setdefault(submodule, []).append(name)
    by_name = {name: submodule for submodule, own in names.items() for name in own}
    found = {m: Drawing(own[0], tuple(map(plain, own))) for m, own in names.items() if _is_random_layer(m)}
    snapshot = Snapshot(module, (args, kwargs))
    try:
        start = _marks()
        in_eval = _run(module, args, kwargs, ())
        seen, waiting = set(found), sorted(in_eval.reads)
        while waiting:
            if (candidate := by_name[waiting.pop(0)]) in seen:
                continue
            seen.add(candidate)
            snapshot.restore()
            run = _run(module, args, kwargs, (candidate,))
            waiting += sorted(run.reads)
            if run.generators != in_eval.generators:
                outputs = run.outputs if run.outputs != in_eval.outputs else ""
                own = names[candidate]
                written = tuple(sorted(run.written - in_eval.written))
                found[candidate] = Drawing(own[0], tuple(map(plain, own)), written, outputs)
    finally:
        snapshot.restore()
    return Found(tuple(found[m] for m in names if m in found), in_eval.generators != start, in_eval.outputs)


@contextlib.contextmanager
def only_in_train(module: nn.Module, chosen: Iterable[nn.Module]) -> Iterator[None]:
    """In it, the chosen submodules are in train, and all others in eval; afterwards, flags are as they were.

    Flags are set one by one: a ``train()`` of the model may do more.
    """
    before = flags(module)
    try:
        for submodule in module.modules():
            submodule.training = False
        for submodule in chosen:
            submodule.training = True
        with fast_path_off():
            yield
    finally:
        set_flags(module, before)


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """In it, torch's transformer layers don't take their fast path for eval, which passes over the dropouts in them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _is_random_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch's, or derived from one, which draws random numbers in train."""
    if isinstance(module, _compat.DROPOUT):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], training: Sequence[nn.Module]) -> _Run:
    reads: set[str] = set()
    before = {name: (buffer, buffer.detach().clone()) for name, buffer in module.named_buffers()}
    # With gradients, as what is captured: without, layers may take other ways.
    with torch.enable_grad(), only_in_train(module, training), mode_reads(module, reads, set()):
        outputs = module(*args, **kwargs)
    written = set()
    for name, buffer in module.named_buffers():
        held, value = before.get(name, (None, None))
        if held is not buffer or value is None or not torch.equal(value, buffer):
            written.add(name)
    return _Run(str(pytree.tree_structure(outputs)), frozenset(written), _marks(), frozenset(reads))


def _marks() -> tuple[bytes, ...]:
    """The states of all generators, to be compared."""
    states = pytree.tree_leaves([state for _, state in generators()])
    return tuple(s.numpy().tobytes() if isinstance(s, Tensor) else pickle.dumps(s) for s in states)
