"""``merge``: adapters folded into the weights beside which they stand."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from compile_modes import messages
from compile_modes.graph.edits import own
from compile_modes.graph.owners import join
from compile_modes.graph.view import View, attribute
from compile_modes.tuning.carrying import let_go
from compile_modes.tuning.editing import Change, all_or_nothing, edited_source, settle, tunable
from compile_modes.tuning.layers import LORA_A, LORA_B, LORA_DROPOUT, TRANSPOSES, Adapter, Layer, adapters


def merge(bound: Any) -> Any:
    """Folds the adapters of a module into the weights beside which they stand, in place, and takes them out.

    ``W + (B @ A) * alpha / r`` for a linear layer, the same by the kernel of A for a convolution; computed in float32
    at least. Afterwards the graph and the names in ``state_dict`` are those of before :func:`lora`. Parameters stay
    frozen.

    Args:
        bound: a module with adapters, or an OptimizedModule around it.

    Returns:
        ``bound``.

    Raises:
        TuningError: there are no adapters; or a weight can't take one in, as it is used elsewhere too (tied, or packed)
            or has groups. Nothing has been changed then.
        BindError: ``bound`` holds no graph.
    """
    root = tunable(bound, "merge")
    with all_or_nothing(root):
        view = View(root)
        view = View(root) if own(view) else view
        merged = _plan(view)
        values = {layer.value: _folded(adapter) for layer, adapter in merged.items()}
        names = [name for layer in merged for name in layer.names]
        removed = {join(name, f"{part}.weight") for name in names for part in (LORA_A, LORA_B)}

        def edit(module: fx.GraphModule, mode: bool) -> None:
            _take_out(View(module), names)

        source = edited_source(root, edit, Change(removed=removed))
        edited = _take_out(view, names)
        for name in names:
            home = root.get_submodule(name)
            for part in (LORA_A, LORA_B, LORA_DROPOUT):
                home._modules.pop(part, None)
            _drop_empty(root, name)
        with _written(values):
            settle(root, source, edited)
    return bound


def _plan(view: View) -> dict[Layer, Adapter]:
    """One adapter of each layer that has some, with its values.

    Raises:
        TuningError: there are none, or one can't be folded.
    """
    found = adapters(view)
    if not found:
        raise messages.NOTHING_TO_MERGE.error()
    for adapter in found:
        if why := _obstacle(view, adapter, found):
            raise messages.NOT_MERGED.error(layer=adapter.layer.name, why=why, where=f"layer {adapter.layer.name!r}")
    return {adapter.layer: adapter for adapter in found}


def _obstacle(view: View, adapter: Adapter, found: list[Adapter]) -> str:
    layer = adapter.layer
    if layer.conv and layer.groups > 1:
        return f"it is a convolution with {layer.groups} groups, and the product of the factors has none"
    with_adapter = {other.call.node for other in found if other.layer is layer}
    if bare := [call.node.name for call in layer.calls if call.node not in with_adapter]:
        return f"the call {bare[0]} has no adapter"
    users = [use for node in view.nodes() if _reads(view, node, layer) for use in _uses(node)]
    if other := [use.name for use in users if use not in with_adapter]:
        return f"its weight is also used by {other[0]}, which it would change"
    return ""


def _reads(view: View, node: fx.Node, layer: Layer) -> bool:
    """Whether a node is the weight of a layer, under whatever name."""
    path = view.state[node] if node.op in ("get_attr", "placeholder") else None
    return path is not None and attribute(view.root, path) is layer.value


def _uses(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a weight: behind a transposition, and not the region that is given it as an operand."""
    for user in node.users:
        if isinstance(user.target, torch._ops.OpOverload):
            one = user.all_input_nodes == [node] and user.users  # a transposition, of which decompositions share one
            yield from user.users if one else [user]


def _folded(adapter: Adapter) -> torch.Tensor:
    """The weight of a layer with its adapter in it, of the weight's dtype."""
    view, weight = adapter.call.body.view, adapter.layer.value
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (_factor(view, adapter, part).to(wide) for part in (LORA_A, LORA_B))
    with torch.no_grad():
        delta = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) * adapter.scale
        return (weight.to(wide) + (delta.t() if adapter.layer.flipped else delta)).to(weight.dtype)


def _factor(view: View, adapter: Adapter, part: str) -> torch.Tensor:
    value = attribute(view.root, join(adapter.layer.name, f"{part}.weight"))
    assert isinstance(value, torch.Tensor)
    return value.detach()


class _written:
    """Writes values into tensors, and puts back those of before if what is done meanwhile fails."""

    def __init__(self, values: Mapping[torch.Tensor, torch.Tensor]) -> None:
        self._values, self._before = values, {tensor: tensor.detach().clone() for tensor in values}

    def __enter__(self) -> None:
        try:
            self._write(self._values)
        except BaseException:
            self._write(self._before)
            raise

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self._write(self._before)

    def _write(self, values: Mapping[torch.Tensor, torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)


def _take_out(view: View, names: Collection[str]) -> set[nn.Module]:
    """Erases the adapters of layers of some names; returns the modules whose graphs were edited."""
    edited: set[nn.Module] = set()
    for adapter in adapters(view):
        if adapter.layer.name in names:
            adapter.total.replace_all_uses_with(adapter.call.node)
            for node in reversed(adapter.nodes):
                _erase(node)
            edited.add(adapter.call.body.module)
    for body in view.bodies:
        if body.module in edited:
            gone = [join(name, part) for name in names for part in (LORA_A, LORA_B, LORA_DROPOUT)]
            edited |= let_go(body, gone)
    return edited


def _erase(node: fx.Node) -> None:
    """Erases a node, the items of its result that nobody uses, and the transpositions that it was alone to use."""
    for item in list(node.users):
        node.graph.erase_node(item)
    inputs = [n for n in node.all_input_nodes if n.target in TRANSPOSES]
    node.graph.erase_node(node)
    for before in inputs:
        if not before.users:
            before.graph.erase_node(before)


def _drop_empty(root: nn.Module, name: str) -> None:
    """Takes out the module that only held an adapter: ``in_proj`` beside ``in_proj_weight``."""
    home = root.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    if type(home) is nn.Module and not (home._modules or home._parameters or home._buffers):
        del (root.get_submodule(parent) if parent else root)._modules[leaf]
