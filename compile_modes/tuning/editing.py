"""What fine-tuning edits: a bound module and the programs that ``save`` stores for it, all of it or nothing."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes.exported.lifting import relift
from compile_modes.exported.programs import in_dialect_of
from compile_modes.exported.provenance import Source
from compile_modes.graph import calls
from compile_modes.graph.dual import DualModule
from compile_modes.graph.edits import own
from compile_modes.graph.finding import find
from compile_modes.graph.rewrite import editable
from compile_modes.graph.sites import BOUND
from compile_modes.graph.view import View


def tunable(module: Any, what: str) -> nn.Module:
    """The bound module that is to be edited.

    Args:
        module: what the caller was given; an OptimizedModule stands for what it is around.
        what: the name of the function, for the error.

    Raises:
        BindError: it has no graph, or is an ExportedProgram.
        TuningError: it isn't bound, or holds two programs or switches.
    """
    inner = getattr(module, "_orig_mod", module)
    if isinstance(inner, DualModule):
        raise messages.TUNES_ONE_GRAPH.error(what=what, holds="two programs")
    root = editable(module)
    if isinstance(root, fx.GraphModule) and not root.meta.get(BOUND):
        raise messages.TUNES_BOUND.error(what=what, kind=type(root).__name__)
    if any(node.target is calls.switch for node in View(root).nodes()):
        raise messages.TUNES_ONE_GRAPH.error(what=what, holds="switches")
    return root


@dataclass
class Change:
    """What an edit does to the state of a program.

    Attributes:
        added: new parameters and buffers, by name; ``unsaved`` names the buffers that no ``state_dict`` has.
        removed: names of those that go, and ``gone`` the path of the module that goes with them.
    """

    added: dict[str, torch.Tensor] = field(default_factory=dict)
    unsaved: Collection[str] = ()
    removed: Collection[str] = ()
    gone: str = ""


def edited_source(
    root: nn.Module, edit: Callable[[fx.GraphModule, bool], None], change: Change, keep: Sequence[str] | None = None
) -> Source | None:
    """The programs that a module was made from, edited; new ones, so that those of before stay as they are.

    Args:
        root: the module. It is only asked for its source.
        edit: edits the module of a program, of which it is told in which mode new sites are to be: literals that
            follow the flags are True in a train program and False in an eval program.
        change: what that does to the state.
        keep: the globs to keep instead of the source's, if they are other ones.

    Returns:
        The new source; None if there is none, or the module was edited otherwise, so that it can't be saved anyway.
    """
    source = Source.of(root)
    if source is None or not source.made(root):
        return None
    programs = {name: _edited(name, program, edit, change) for name, program in source.programs.items()}
    new = copy.copy(source)
    new.programs, new.keep = programs, list(source.keep if keep is None else keep)
    return new


def _edited(
    name: str, program: ExportedProgram, edit: Callable[[fx.GraphModule, bool], None], change: Change
) -> ExportedProgram:
    root: Any = program.module()
    own(View(root))
    modes = [site.training for site in find(View(root)) if not site.modeless]
    whole = program.dialect == "TRAINING"  # decompositions erase a dropout in eval
    edit(root, name == "train" or (name == "model" and (any(modes) or not modes or not whole)))
    lifted = relift(root, program, **vars(change))
    return in_dialect_of(program, lifted)


def settle(root: nn.Module, source: Source | None, edited: Collection[nn.Module]) -> None:
    """Makes edited graphs take effect, and a source the module's."""
    for module in edited:
        _compat.refresh(module)
    if source is not None:
        source.stay_with(root)


@contextlib.contextmanager
def all_or_nothing(root: nn.Module) -> Iterator[None]:
    """Puts submodules, state, flags and graphs back as they were if what is done meanwhile fails or is interrupted.

    Values of tensors are not kept.
    """
    kept = _Kept(root)
    try:
        yield
    except BaseException:
        kept.restore()
        raise


class _Kept:
    """What an edit may change in a module, and the way back."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._meta = root, dict(getattr(root, "meta", {}))
        self._modules = [(m, _names(m), set(m._non_persistent_buffers_set), m.training) for m in root.modules()]
        self._grads = [(p, p.requires_grad) for p in root.parameters()]
        self._attributes = {k: v for k, v in vars(root).items() if isinstance(v, torch.Tensor)}
        self._graphs = [(body, body.graph, _copied(body.graph)) for body in View(root).bodies]

    def restore(self) -> None:
        for module, names, unsaved, training in self._modules:
            for held, there in names:
                held.clear()
                held.update(there)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(unsaved)
            module.training = training
        for parameter, requires_grad in self._grads:
            parameter.requires_grad_(requires_grad)
        for name in [k for k, v in vars(self._root).items() if isinstance(v, torch.Tensor)]:
            if name not in self._attributes:
                del self._root.__dict__[name]
        meta: Any = getattr(self._root, "meta", {})
        meta.clear()
        meta.update(self._meta)
        for body, before, copied in self._graphs:
            if before is not body.graph or str(before) != str(copied):
                body.module.graph = copied  # type: ignore[assignment]
                _compat.refresh(body.module)


def _names(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dicts of a module's submodules and state, each with a copy."""
    return [(held, dict(held)) for held in (module._modules, module._parameters, module._buffers)]


def _copied(graph: fx.Graph) -> fx.Graph:
    copied = copy.deepcopy(graph)
    for before, node in zip(graph.nodes, copied.nodes, strict=True):
        node.name = before.name  # copies of names that Python has taken ("input") get others
    return copied
