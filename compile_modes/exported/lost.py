"""What of a decomposed program, or an eval export, may depend on mode and is no site, so that no flag reaches it."""

from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes.errors import ModeWarning, few, few_lines
from compile_modes.graph.ops import STATS, lookup
from compile_modes.graph.owners import join, module_class
from compile_modes.graph.sites import REMARKS
from compile_modes.graph.view import View, attribute


def remark(view: View, program: torch.export.ExportedProgram | None, trains: bool) -> ModeWarning | None:
    """Says what :func:`remarks` finds, and keeps it for ``explain``.

    Args:
        view: the module of a decomposed program, recomposed as far as possible.
        program: the program, if at hand.
        trains: whether any site is in train mode.

    Returns:
        A warning; None if there is nothing to say.
    """
    found = list(remarks(view))
    if not trains:
        found += [*_unread(view), *_erased(view, program)]
    view.root.__dict__.setdefault("meta", {})[REMARKS] = found
    if not found:
        return None
    return messages.DECOMPOSED_PROGRAM.warning(parts=few_lines("  " + line for line in found))


def left_nothing(view: View, program: torch.export.ExportedProgram | None) -> list[str]:
    """The modules without state of a program in training IR that are in no graph, parents in the place of children.

    In an eval export, they may be random masks, or something else that is for train only, or just Identity.
    """
    gone = set(_gone(view, program))
    return sorted(name for name in gone if not any(parent in gone for parent in _prefixes(name)[:-1]))


def _gone(view: View, program: torch.export.ExportedProgram | None) -> list[str]:
    """All that the program knows as modules and that have neither state nor nodes, in its order."""
    known = [entry.fqn for entry in program.module_call_graph] if program is not None else []
    paths = {view.owner[node] for node in view.nodes() if not _erased_dropout(node)}
    paths |= {name for tensors in (view.root.named_parameters, view.root.named_buffers) for name, _ in tensors()}
    present = {prefix for path in paths for prefix in _prefixes(path)}
    return [name for name in known if name not in ("", _compat.GUARDS) and name not in present]


def _prefixes(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names))]


def remark_nothing(root: nn.Module, names: Sequence[str]) -> ModeWarning | None:
    """As :func:`remark`, of modules that an eval export has left nothing of."""
    if not names:
        return None
    modules = few(map(repr, names))
    root.__dict__.setdefault("meta", {})[REMARKS] = [messages.LEFT_NOTHING.reason(modules=modules)]
    return messages.NOTHING_LEFT.warning(modules=modules)


def remarks(view: View) -> Iterator[str]:
    """A line for each module whose dropout the decomposition has put beyond reach, or lost."""
    graphs = [body.graph for body in view.bodies if not body.gated]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    having_sites = {view.owner[node] for node in nodes if lookup(node.target) is not None}
    said: set[str] = set()
    for node in nodes:
        owner = view.owner[node]
        kind = module_class(node) or object
        lost: messages.Remark | None = None
        if issubclass(kind, _compat.DROPOUT) and owner not in having_sites and not _erased_dropout(node):
            lost = messages.STAYS
        elif issubclass(kind, nn.RNNBase) and owner not in having_sites and _layers(view.root, owner) > 1:
            lost = messages.RNN_DECOMPOSED
        if lost is not None and owner not in said:
            said.add(owner)
            yield lost.reason(owner=owner or "(root)")


def _layers(root: nn.Module, owner: str) -> int:
    return 1 if attribute(root, join(owner, "weight_ih_l1")) is None else 2


def _erased_dropout(node: fx.Node) -> bool:
    """Whether a node is all that is left of a dropout in eval mode; newer releases leave nothing."""
    return node.target is torch.ops.aten.clone.default and issubclass(module_class(node) or object, _compat.DROPOUT)


def _unread(view: View) -> Iterator[str]:
    """Batch norms of which a graph in eval mode has only the buffers: in train, eager would update them."""
    read = {id(view.held[node]) for body in view.bodies for node in body.graph.find_nodes(op="get_attr") if node.users}
    for name, buffer in view.root.named_buffers():
        home, _, leaf = name.rpartition(".")
        if leaf == STATS[0] and id(buffer) not in read:
            yield messages.UNREAD.reason(owner=home or "(root)")


def _erased(view: View, program: torch.export.ExportedProgram | None) -> Iterator[str]:
    """Dropouts leave nothing of themselves in eval mode; all that is known are the modules that left nothing."""
    gone = _gone(view, program)
    gone = [name for name in gone if not any(other.startswith(name + ".") for other in gone)]
    # With neither a site nor a module that vanished, nothing says that the program was exported in eval mode.
    if gone or any(lookup(node.target) for node in view.nodes()):
        if not gone:
            yield messages.ERASED.reason()
        else:
            yield messages.ERASED_MODULES.reason(modules=few(gone))
