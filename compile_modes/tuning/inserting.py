"""The nodes of adapters, put beside the calls of layers."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from torch import fx, nn

from compile_modes.exported.binding import ensure_module
from compile_modes.graph.effects import named_arguments
from compile_modes.graph.owners import join
from compile_modes.graph.view import Body, View
from compile_modes.tuning.carrying import carried, computed
from compile_modes.tuning.layers import (
    ADD,
    CONV,
    DROPOUT,
    LINEAR,
    LORA_A,
    LORA_B,
    LORA_DROPOUT,
    MUL,
    Call,
    Layer,
    layers,
)


def insert(
    view: View,
    known: dict[str, str],
    factors: dict[str, dict[str, nn.Module]],
    scale: float,
    flag: Callable[[Body, str], fx.Node | bool],
) -> set[nn.Module]:
    """Puts adapters beside the calls of layers.

    Args:
        view: the graphs.
        known: the name that the adapter of a layer goes by, for each name of the layer.
        factors: the modules of an adapter, by that name.
        scale: what adapters are multiplied by.
        flag: gives the mode of a dropout in a body.

    Returns:
        The modules whose graphs were edited.
    """
    edited: set[nn.Module] = set()
    for layer in layers(view):
        name = known.get(layer.name)
        if name is None:
            continue
        home = ensure_module(view.root, name)
        for part, module in factors[name].items():
            home._modules.setdefault(part, module)
        for call in layer.calls:
            edited |= _insert_one(call, name, factors[name], layer, scale, flag)
    return edited


def _insert_one(
    call: Call,
    name: str,
    parts: dict[str, nn.Module],
    layer: Layer,
    scale: float,
    flag: Callable[[Body, str], fx.Node | bool],
) -> set[nn.Module]:
    edited = {call.body.module}
    weights = {}
    for part in (LORA_A, LORA_B):
        weights[part] = carried(call.body, f"{join(name, part)}.weight", edited)
    dropped = flag(call.body, join(name, LORA_DROPOUT)) if LORA_DROPOUT in parts else None
    after = _Writer(call, name)
    x = call.x
    if dropped is not None:
        p: Any = parts[LORA_DROPOUT].p
        x = after.add(DROPOUT, (x, p, dropped), LORA_DROPOUT, nn.Dropout)
    if layer.conv:
        other = {"input": x, "weight": weights[LORA_A], "bias": None, "groups": 1}
        a = after.add(call.node.target, (), LORA_A, type(parts[LORA_A]), **named_arguments(call.node) | other)
        point = {"input": a, "weight": weights[LORA_B], "groups": layer.groups}
        b = after.add(CONV[layer.value.ndim - 3], (), LORA_B, type(parts[LORA_B]), **point)
    else:
        a = after.add(LINEAR, (x, weights[LORA_A]), LORA_A, nn.Linear)
        b = after.add(LINEAR, (a, weights[LORA_B]), LORA_B, nn.Linear)
    scaled = after.add(MUL, (b, scale))
    total = after.add(ADD, (call.node, scaled))
    call.node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    return edited


class _Writer:
    """Adds nodes behind a call of a layer, each behind the one before."""

    def __init__(self, call: Call, name: str) -> None:
        self._call, self._name, self._last = call, name, call.node

    def add(
        self, target: Any, args: tuple[Any, ...], part: str = "", kind: type[nn.Module] = nn.Module, **kwargs: Any
    ) -> fx.Node:
        graph, like = self._call.body.graph, self._call.node
        names = [argument.name for argument in target._schema.arguments]
        args += tuple(kwargs.pop(name) for name in takewhile(kwargs.__contains__, names[len(args) :]))
        with graph.inserting_after(self._last):
            node = graph.call_function(target, args, kwargs)
        stack = dict(like.meta.get("nn_module_stack") or {})
        if part and stack:
            path = join(self._name, part)
            stack[f"L__self__{path}"] = (path, f"{kind.__module__}.{kind.__qualname__}")
        node.meta = {"nn_module_stack": stack} if stack else {}
        if "stack_trace" in like.meta:
            node.meta["stack_trace"] = like.meta["stack_trace"]
        if (value := computed(node, self._call.body)) is not None:
            node.meta["val"] = value
        self._last = node
        return node
