"""``replace_head``: another module in the place of a submodule of a bound program."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes.exported.binding import ensure_module
from compile_modes.exported.provenance import Source
from compile_modes.graph.edits import own
from compile_modes.graph.finding import find
from compile_modes.graph.owners import canonical, join
from compile_modes.graph.requests import owner_matches
from compile_modes.graph.view import View
from compile_modes.tuning.carrying import let_go
from compile_modes.tuning.donors import Donor
from compile_modes.tuning.editing import Change, all_or_nothing, edited_source, settle, tunable
from compile_modes.tuning.grafting import graft
from compile_modes.tuning.patterns import near


@dataclass
class Region:
    """The nodes of a submodule.

    Attributes:
        nodes: the nodes, in order.
        inputs: the tensors that come from outside, without parameters and buffers, in order of their first use.
        output: the node whose value is used outside.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    output: fx.Node


def replace_head(bound: Any, owner: str, module: nn.Module) -> Any:
    """Puts another module into the place of a submodule of a bound program, in place.

    The nodes of ``owner`` go, and those of ``module`` come in: it is exported in both modes for that, on inputs of the
    shapes, dtypes and devices that the old one got (sizes that may vary still may), so that its dropouts and batch
    norms follow their flags. ``module`` itself becomes the submodule: its parameters are shared, not copied, its names
    are found below ``owner``, and its modes stay as they are. Parameters and buffers of the old one that nothing else
    reads are gone. What comes after it must take what the new one returns.

    >>> cm.replace_head(model, "fc", nn.Linear(512, 10))

    Args:
        bound: a module that :func:`compile_modes.bind` or :func:`compile_modes.load` has made, with one graph, or an
            OptimizedModule around it, which compiles anew.
        owner: the dotted path of the submodule, as :func:`explain` writes it.
        module: an eager module that takes as many tensors as the old one, and returns one.

    Returns:
        ``bound``.

    Raises:
        TuningError: there is no such submodule (near matches are named); it is called several times, inside a region,
            or has several results; ``module`` can't be called on what it gets, doesn't fit what follows, or decides by
            its mode in Python; or ``bound`` isn't bound or holds two programs or switches. Nothing has been changed
            then.
        BindError: ``bound`` holds no graph.
    """
    root = tunable(bound, "replace_head")
    if not isinstance(module, nn.Module) or isinstance(module, fx.GraphModule):
        raise messages.NOT_A_HEAD.error(kind=type(module).__name__)
    with all_or_nothing(root):
        view = View(root)
        view = View(root) if own(view) else view
        region = _region(view, owner)
        donor = Donor.of(module, [_compat.value(node) for node in region.inputs], owner)
        change = _change(root, owner, module)

        def edit(program: fx.GraphModule, mode: bool) -> None:
            inner = View(program)
            _replace(inner, _region(inner, owner), donor.program(mode), module, owner)

        source = edited_source(root, edit, change)
        edited = _replace(view, region, donor.bound, module, owner)
        if source is not None:
            _prune(source, owner)
        settle(root, source, edited)
    return bound


def _region(view: View, owner: str) -> Region:
    """Finds the nodes of a submodule.

    Raises:
        TuningError: there are none, or what replaces them would not be one call.
    """
    owners = dict.fromkeys(view.owner[node] for node in view.nodes() if node.op == "call_function")
    names = {".".join(path.split(".")[: i + 1]) for path in owners if path for i in range(path.count(".") + 1)}
    names = {name for name in names if not name.startswith("_empty_nn_module_stack")}
    if not isinstance(owner, str) or owner not in names:
        raise messages.NO_SUCH_HEAD.error(owner=owner, near=near(str(owner), sorted(names)))
    inside = [node for node in view.nodes() if node.op == "call_function" and _below(view.owner[node], owner)]
    if any(view.body(node) is not view.main for node in inside):
        raise _unfit(owner, "it is called inside a region (no_grad, autocast, a branch)")
    if len({_turn(node, owner) for node in inside}) > 1:
        raise _unfit(owner, "it is called several times")
    nodes = _with_sizes(inside)
    outputs = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(outputs) != 1 or not isinstance(_compat.value(outputs[0]), torch.Tensor):
        raise _unfit(owner, f"it has {len(outputs)} results that are used, where one tensor is expected")
    given = dict.fromkeys(operand for node in inside for operand in node.all_input_nodes if operand not in nodes)
    inputs = [n for n in given if n.op != "get_attr" and isinstance(_compat.value(n), torch.Tensor)]
    return Region([node for node in view.main.graph.nodes if node in nodes], inputs, outputs[0])


def _below(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _turn(node: fx.Node, owner: str) -> str:
    """Which call of a module a node belongs to, as export counts them."""
    stack = node.meta["nn_module_stack"].items()
    return next((str(key).partition("@")[2] for key, (path, _) in stack if canonical(path) == owner), "")


def _with_sizes(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes, and the sizes of their values, which export attributes to nobody."""
    found = set(nodes)
    for node in nodes:
        for user in node.users:
            number = user.op == "call_function" and not isinstance(_compat.value(user), torch.Tensor | list | tuple)
            if number and user not in found and all(use in found for use in user.users):
                found.add(user)
    return found


def _unfit(owner: str, why: str) -> Exception:
    return messages.NOT_REPLACED.error(owner=owner, why=why, where=f"submodule {owner!r}")


def _change(root: nn.Module, owner: str, module: nn.Module) -> Change:
    old = [*dict(root.named_parameters(remove_duplicate=False)), *dict(root.named_buffers(remove_duplicate=False))]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    saved = module.state_dict().keys()
    return Change(
        {join(owner, name): tensor for name, tensor in {**parameters, **buffers}.items()},
        [join(owner, name) for name in buffers if name not in saved],
        [name for name in old if name.startswith(f"{owner}.")],
        owner,
    )


def _replace(view: View, region: Region, donor: fx.GraphModule, module: nn.Module, owner: str) -> set[nn.Module]:
    """Carries the replacement out in one graph; returns the modules whose graphs were edited."""
    _read_elsewhere(view, region, owner)
    root = view.root
    parent, _, leaf = owner.rpartition(".")
    graph = view.main.graph
    before = [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith(f"{owner}.")]
    ensure_module(root, parent)._modules[leaf] = module
    graft(view, region.inputs, region.output, donor, module, owner)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for node in before:
        if not node.users:
            graph.erase_node(node)
    return {root, *let_go(view.main, [owner])}


def _read_elsewhere(view: View, region: Region, owner: str) -> None:
    """Has what else reads a parameter of the old module read it by another of its names, as of tied weights.

    Raises:
        TuningError: it has no other.
    """
    inside = set(region.nodes)
    named = [*view.root.named_parameters(remove_duplicate=False), *view.root.named_buffers(remove_duplicate=False)]
    for node in view.main.graph.find_nodes(op="get_attr"):
        users = [user for user in node.users if user not in inside]
        held = view.held[node]
        if not users or not isinstance(held, torch.Tensor) or not str(node.target).startswith(f"{owner}."):
            continue
        other = next((n for n, t in named if t is held and not n.startswith(f"{owner}.")), None)
        if other is None:
            raise _unfit(owner, f"its {node.target!r} is also read by {users[0].name}, outside of it")
        with view.main.graph.inserting_before(node):
            read = view.main.graph.create_node("get_attr", other)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in inside)


def _prune(source: Source, owner: str) -> None:
    """Leaves out globs for binding that named nothing but the old module's sites."""
    program = next(iter(source.programs.values()))
    owners = {site.owner for site in find(View(program.module()))}

    def stays(pattern: str) -> bool:
        return any(owner_matches(name, pattern) for name in owners) or not _may_name(pattern, owner)

    source.keep = [pattern for pattern in source.keep if stays(pattern)]
    source.dropout_p = {pattern: p for pattern, p in source.dropout_p.items() if stays(pattern)}


def _may_name(pattern: str, owner: str) -> bool:
    """Whether a glob is one of names at or below a module."""
    return owner_matches(owner, pattern) or pattern.startswith(f"{owner}.")
