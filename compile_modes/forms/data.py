"""Dropouts whose mode is data: one graph for all modes, which takes a vector of flags as one more input.

``dropout(x, p, training)`` becomes ``x * where(flag, mask / (1 - p), 1)``. The mask comes from an operator of its own,
which looks at the flag as well: in eval it draws nothing, and in train what eager mode draws, number by number, so that
both the results and the state of the generator are eager's in every vector of modes, on CPU. On other devices a look at
the flag would have the host wait, and the mask is always drawn.

The operator takes sizes, not the tensor, which may then be computed where it is used.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from compile_modes import _compat
from compile_modes._compat.flag_guards import add_flags
from compile_modes.graph.edits import insert_traced
from compile_modes.graph.sharing import shares_writes
from compile_modes.graph.sites import Site

aten = torch.ops.aten

_LIBRARY = torch.library.Library("compile_modes", "FRAGMENT")
_LIBRARY.define(
    "keep_mask(Tensor flags, int index, SymInt[] size, float keep) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


class _Kind(NamedTuple):
    """What an op drops: whole channels or not, to zero or to SELU's lowest value; and whether it writes to its input."""

    features: bool
    alpha: bool
    in_place: bool


_DROPOUTS: dict[Any, _Kind] = {
    aten.dropout.default: _Kind(False, False, False), aten.dropout_.default: _Kind(False, False, True),
    aten.feature_dropout.default: _Kind(True, False, False), aten.feature_dropout_.default: _Kind(True, False, True),
    aten.alpha_dropout.default: _Kind(False, True, False), aten.alpha_dropout_.default: _Kind(False, True, True),
    aten.feature_alpha_dropout.default: _Kind(True, True, False),
    aten.feature_alpha_dropout_.default: _Kind(True, True, True),
}  # fmt: skip
_ALPHA = 1.7580993408473766  # as ATen has it: scale times alpha of SELU


def keep_mask(flags: Tensor, index: int, size: Sequence[int], keep: float) -> Tensor:
    """True with probability ``keep``, drawn as eager's dropout draws, if the flag is set; otherwise all False."""
    if not flags[index].item():
        return torch.zeros(size, dtype=torch.bool)
    return _drawn(flags, index, size, keep)


def _drawn(flags: Tensor, index: int, size: Sequence[int], keep: float) -> Tensor:
    mask = torch.empty(size, dtype=torch.bool, device=flags.device)
    return mask.bernoulli_(keep) if mask.numel() else mask


def _described(flags: Tensor, index: int, size: Sequence[int], keep: float) -> Tensor:
    return flags.new_empty(size)


_LIBRARY.impl("keep_mask", keep_mask, "CPU")
_LIBRARY.impl("keep_mask", _drawn, "CompositeExplicitAutograd")
_LIBRARY.impl("keep_mask", _described, "Meta")

_KEEP_MASK = torch.ops.compile_modes.keep_mask.default


def why_no_data(site: Site) -> str:
    """Why the mode of a site can't be data; empty if it can."""
    if site.op.overload not in _DROPOUTS:
        return "it is no dropout" if site.op.family != "attention" else "the probability that it is given is a number"
    if site.body.caller is not None:
        return "it is in the body of a region, which takes no flags"
    if isinstance(site.p, fx.Node) or not isinstance(site.p, float | int):
        return "its probability is computed, or lost"
    value = _compat.value(site.read("input"))
    if not isinstance(value, _compat.FakeTensor) or not value.dtype.is_floating_point or value.is_nested:
        return "its input is no plain tensor"
    if not _DROPOUTS[site.op.overload].in_place and shares_writes(site.node, _DROPOUTS):
        return "eval mode hands its input on, and something writes to that in place or returns it"
    return ""


def as_data(graph: fx.GraphModule, chosen: Mapping[Site, int]) -> Tensor | None:
    """Rewrites dropouts, in place, so that a new last input of the graph says in which mode they are.

    Args:
        graph: a captured graph, which autograd has not seen.
        chosen: the sites, none of which :func:`why_no_data` objects to, all on one device; each with the position of
            its flag.

    Returns:
        The fake tensor that describes the new input; None if there is nothing to do.
    """
    if not chosen:
        return None
    like = _compat.value(next(iter(chosen)).read("input"))
    flags, fake = add_flags(graph.graph, like, 1 + max(chosen.values()))
    for site, index in chosen.items():
        if site.p:
            _rewrite(site, flags, index)
        else:  # the same in both modes
            _replace(site, site.read("input"))
    graph.recompile()
    return fake


def _rewrite(site: Site, flags: fx.Node, index: int) -> None:
    features, alpha, in_place = _DROPOUTS[site.op.overload]
    p = float(site.p or 0.0)

    def apply(x: Tensor, flags: Tensor) -> tuple[Tensor]:
        if p == 1:
            factor = torch.where(flags[index], x.new_zeros(()), x.new_ones(()))
            return (x.mul_(factor) if in_place else x * factor,)
        mask = _mask(x, flags, index, 1 - p, features)
        if alpha:
            y = _selu(x, mask, flags[index], p)
            return (x.copy_(y) if in_place else y,)
        factor = torch.where(flags[index], mask.to(x.dtype) / (1 - p), 1.0)
        return (x.mul_(factor) if in_place else x * factor,)

    (result,) = insert_traced(site.node, site.node, apply, [site.read("input"), flags])
    _replace(site, result)


def _replace(site: Site, value: Any) -> None:
    site.node.replace_all_uses_with(value)
    site.node.graph.erase_node(site.node)


def _mask(x: Tensor, flags: Tensor, index: int, keep: float, features: bool) -> Tensor:
    """A mask for ``x``, drawn in the order in which eager's would lie in memory."""
    if features:
        size = [*x.shape[:2], *[1] * (x.ndim - 2)]
        return torch.ops.compile_modes.keep_mask(flags, index, size, keep)  # type: ignore[no-any-return]
    order = _memory_order(x)
    mask: Tensor = torch.ops.compile_modes.keep_mask(flags, index, [x.shape[d] for d in order], keep)
    return mask if order == sorted(order) else mask.permute([order.index(d) for d in range(x.ndim)])


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of a dense tensor, the outermost in memory first; otherwise as they come."""
    plain = list(range(x.ndim))
    if not all(type(number) is int for number in (*x.shape, *x.stride())):
        return plain
    order = sorted(plain, key=lambda d: (-x.stride(d), d))
    return order if x.permute(order).is_contiguous() else plain


def _selu(x: Tensor, mask: Tensor, flag: Tensor, p: float) -> Tensor:
    a = 1.0 / ((_ALPHA * _ALPHA * p + 1) * (1 - p)) ** 0.5
    noise = mask.to(x.dtype)
    return torch.where(flag, x * (noise * a) + ((noise - 1) * (_ALPHA * a) + _ALPHA * a * p), x)
