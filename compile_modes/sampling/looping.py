"""One call after the other, for modules that no graph can be made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.graph.snapshot import Snapshot, generators
from compile_modes.sampling.finding import Drawing, only_in_train


def check(live: Sequence[Drawing]) -> None:
    """Raises SampleError for a module that writes in train: a graph could tell that apart, a call can't."""
    for drawing in live:
        if drawing.writes:
            what = f"it writes {few(drawing.writes)}"
            raise messages.WRITES_IN_TRAIN.error(what=what, owner=repr(drawing.names[0]))


def loop(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], live: Sequence[Drawing], n: int
) -> Iterator[tuple[list[Any], Any]]:
    """Calls a module ``n`` times, each time from the same state, and leaves everything as it was, but the generators.

    Args:
        module: the module, compiled or not.
        args, kwargs: what to call it with.
        live: the modules that are in train meanwhile.
        n: how often.

    Yields:
        The flat results of one call, tensors of shape (1, ...), and their structure.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    modules |= {".".join(p for p in name.split(".") if p != "_orig_mod"): m for name, m in modules.items()}
    snapshot = Snapshot(module, (args, kwargs))
    for _ in range(n):
        try:
            with only_in_train(module, [modules[drawing.names[0]] for drawing in live]):
                outputs = module(*args, **kwargs)
        finally:
            after = list(generators())
            snapshot.restore()  # with the generators, which go on
            for set_state, state in after:
                set_state(state)
        leaves, spec = pytree.tree_flatten(outputs)
        kept = {id(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        yield [_row(leaf, id(leaf) in kept) for leaf in leaves], spec


def _row(leaf: Any, is_argument: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return (leaf.clone() if is_argument or not torch.is_grad_enabled() else leaf).unsqueeze(0)
