"""``lora``: low-rank adapters beside the linear and convolution layers of a bound program."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from compile_modes import messages
from compile_modes.exported.binding import ensure_module, flag_node
from compile_modes.graph.edits import own
from compile_modes.graph.owners import join
from compile_modes.graph.view import View, attribute
from compile_modes.tuning.carrying import can_carry
from compile_modes.tuning.editing import Change, all_or_nothing, edited_source, settle, tunable
from compile_modes.tuning.inserting import insert
from compile_modes.tuning.layers import (
    LORA_A,
    LORA_B,
    LORA_DROPOUT,
    Layer,
    adapters,
    base_layers,
)
from compile_modes.tuning.patterns import globs, matched


@dataclass
class Plan:
    """What :func:`lora` is about to do: which layers get which modules, and what trains beside them.

    Attributes:
        view: the graphs.
        chosen: the layers, with the modules for each: ``lora_A``, ``lora_B`` and, with dropout, ``lora_dropout``.
        scale: what adapters are multiplied by.
        trains: names of parameters that keep ``requires_grad`` as it is, or get it.
    """

    view: View
    chosen: list[tuple[Layer, dict[str, nn.Module]]]
    scale: float
    trains: set[str]

    @property
    def change(self) -> Change:
        """The parameters that come in, by all names of the modules that hold them."""
        held = [
            (join(name, part), m) for layer, parts in self.chosen for name in layer.names for part, m in parts.items()
        ]
        return Change({f"{path}.{leaf}": p for path, module in held for leaf, p in module.named_parameters()})


def lora(
    bound: Any,
    targets: str | Sequence[str],
    r: int = 8,
    alpha: float = 8,
    dropout: float = 0.0,
    *,
    exclude: str | Sequence[str] = (),
    modules_to_save: str | Sequence[str] = (),
) -> Any:
    """Puts low-rank adapters beside linear and convolution layers of a bound program, in place, and freezes the rest.

    Each layer gives ``layer(x) + lora_B(lora_A(dropout(x))) * alpha / r`` from then on (Hu et al., "LoRA", ICLR 2022),
    as with PEFT: ``lora_A`` begins with ``kaiming_uniform(a=sqrt(5))`` and ``lora_B`` with zeros, so that nothing
    changes at first. Of a convolution, ``lora_A`` has its kernel, stride, padding and dilation, and ``lora_B`` a kernel
    of 1. Adapters are submodules of their layer: ``fc.lora_A.weight`` and ``fc.lora_B.weight`` of shapes (r, in) and
    (out, r), with dtype and device of the weight; and ``fc.lora_dropout``, a site that follows ``train()`` and
    ``eval()`` as any. :func:`compile_modes.save`, copies, exports and compilers take them for what they are.

    A layer is named by the module that holds its weight. Where a module holds several (the packed projection
    ``in_proj_weight`` of nn.MultiheadAttention), it is ``<module>.in_proj``. A layer that is called several times has
    one adapter. Layers with adapters keep those, trainable as they are; ``merge`` first to get others.

    Args:
        bound: a module that :func:`compile_modes.bind` or :func:`compile_modes.load` has made, with one graph, or an
            OptimizedModule around it, which compiles anew.
        targets: globs of names of layers, such as ``"*.q_proj"``.
        r: the rank of the adapters. A convolution with groups needs a multiple of them.
        alpha: the numerator of their scale.
        dropout: probability of the dropout in front of ``lora_A``; without, there is none.
        exclude: globs of layers to leave out.
        modules_to_save: globs of modules whose parameters train as well, a new head's say.

    Returns:
        ``bound``.

    Raises:
        TuningError: a pattern matches nothing, a layer can't have an adapter (its name and the reason are said), or the
            module isn't bound or holds two programs or switches. Nothing has been changed then.
        OptionError: an argument isn't usable.
        BindError: ``bound`` holds no graph.
    """
    _check(r, alpha, dropout)
    root = tunable(bound, "lora")
    patterns = globs(targets, "targets"), globs(exclude, "exclude"), globs(modules_to_save, "modules_to_save")
    with all_or_nothing(root):
        view = View(root)
        plan = _plan(View(root) if own(view) else view, *patterns, r, alpha / r, dropout)
        known = {name: layer.names[0] for layer, _ in plan.chosen for name in layer.names}
        factors = {layer.names[0]: parts for layer, parts in plan.chosen}

        def edit(module: fx.GraphModule, mode: bool) -> None:
            insert(View(module), known, factors, plan.scale, lambda *_: mode)

        source = edited_source(root, edit, plan.change)
        _apart(root, plan)
        edited = insert(plan.view, known, factors, plan.scale, flag_node)
        for name, parameter in root.named_parameters():
            if name not in plan.trains:
                parameter.requires_grad_(False)
            elif parameter.is_floating_point():
                parameter.requires_grad_(True)
        settle(root, source, edited)
    return bound


def _check(r: Any, alpha: Any, dropout: Any) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise messages.NOT_A_RANK.error(r=r)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha <= 0:
        raise messages.NOT_AN_ALPHA.error(alpha=alpha)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise messages.NOT_A_DROPOUT.error(dropout=dropout)


def _plan(
    view: View,
    targets: Sequence[str],
    exclude: Sequence[str],
    save: Sequence[str],
    r: int,
    scale: float,
    dropout: float,
) -> Plan:
    if not targets:
        raise messages.NO_TARGETS.error()
    found = base_layers(view)
    names = [layer.name for layer in found]
    left_out = set(matched(exclude, names, "exclude", "linear or convolution layer"))
    wanted = set(matched(targets, names, "targets", "linear or convolution layer")) - left_out
    chosen = [layer for layer in found if layer.name in wanted]
    if not chosen:
        raise messages.ALL_EXCLUDED.error()
    adapted = {adapter.layer.name for adapter in adapters(view)}
    for layer in chosen:
        if why := _obstacle(layer, view, adapted, r):
            raise messages.NO_ADAPTER.error(layer=layer.name, why=why, where=f"layer {layer.name!r}")
    trains = {n for n in dict(view.root.named_parameters()) if n.rpartition(".")[0] in _factors(view)}
    trains |= {n for m in _modules(view.root, save) for n in _parameters(view.root, m)}
    plan = Plan(view, [(layer, _parts(layer, r, dropout)) for layer in chosen], scale, trains)
    plan.trains |= plan.change.added.keys()
    return plan


def _modules(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in root.named_modules() if name and _parameters(root, name)]
    return matched(patterns, names, "modules_to_save", "module with parameters")


def _parameters(root: nn.Module, module: str) -> list[str]:
    return [join(module, name) for name, _ in root.get_submodule(module).named_parameters()]


def _factors(view: View) -> set[str]:
    """The paths of the adapters that are there already."""
    return {join(name, part) for a in adapters(view) for name in a.layer.names for part in (LORA_A, LORA_B)}


def _obstacle(layer: Layer, view: View, adapted: set[str], r: int) -> str:
    """Why a layer can't have an adapter; empty if it can."""
    if layer.obstacle:
        return layer.obstacle
    if layer.name in adapted:
        return "it has one"
    if layer.conv and r % layer.groups:
        return f"its {layer.groups} groups don't divide r={r}"
    if any(not can_carry(call.body) for call in layer.calls):
        return "it is called inside a branch, a loop, or a region that several calls share"
    for name in layer.names:
        home = attribute(view.root, name)
        if home is not None and not isinstance(home, nn.Module):
            return f"its name is taken by a {type(home).__name__}"
        if taken := [part for part in (LORA_A, LORA_B, LORA_DROPOUT) if hasattr(home, part)]:
            return f"it has a {taken[0]!r} of its own"
    return ""


def _parts(layer: Layer, r: int, dropout: float) -> dict[str, nn.Module]:
    """New modules for an adapter, on the weight's device and in its dtype."""
    inner, outer = layer.features
    made: dict[str, Any] = {"bias": False, "device": layer.value.device, "dtype": layer.value.dtype}
    a: nn.Module
    b: nn.Module
    if layer.conv:
        kernel = tuple(layer.value.shape[2:])
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        a, b = kind(inner, r, kernel, **made), kind(r, outer, 1, groups=layer.groups, **made)
    else:
        a, b = nn.Linear(inner, r, **made), nn.Linear(r, outer, **made)
    nn.init.zeros_(b.weight)  # type: ignore[arg-type]  # that of a is kaiming_uniform(a=sqrt(5)) by default
    return {LORA_A: a, LORA_B: b} | ({LORA_DROPOUT: nn.Dropout(dropout)} if dropout else {})


def _apart(root: nn.Module, plan: Plan) -> None:
    """Gives layers modules of their own, where binding has made them one with others that hold the same weight."""
    for layer, parts in plan.chosen:
        home = ensure_module(root, layer.names[0])
        others = [name for name, m in root.named_modules(remove_duplicate=False) if m is home]
        if set(others) - {*layer.names}:
            own_home = nn.Module()
            own_home._parameters, own_home._buffers = dict(home._parameters), dict(home._buffers)
            own_home.training = home.training
            home = own_home
        for name in filter(None, layer.names):  # "" is the root itself
            parent, _, leaf = name.rpartition(".")
            (root.get_submodule(parent) if parent else root)._modules[leaf] = home
        for part, module in parts.items():
            home._modules[part] = module.train(home.training)
