"""Dropouts whose mode is data: one graph for all modes, which takes a vector of flags as one more input.

``dropout(x, p, training)`` becomes ``x * where(mask, scale, 0)``, where scale is ``1 / (1 - p)`` in train; in eval it
is 1, and the mask is all True. For eval nothing is drawn, and for train what eager mode draws, number by number:
results, and the state of the generator, are eager's in every vector of modes, on CPU.

Masks are inputs as well, drawn ahead of the graph. Where their sizes aren't known there, or where other ops of the
graph draw in between as eager does, they come from an operator in the graph, which looks at the flag. On other devices
than CPU a look would have the host wait, and that operator always draws.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from compile_modes import _compat
from compile_modes._compat.flag_guards import add_input
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
    """Whether an op drops whole channels, whether to SELU's lowest value, and whether it writes to its input."""

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
    """True with probability ``keep``, drawn as eager's dropout draws, if the flag is set; otherwise all True."""
    if not flags[index].item():
        return torch.ones(size, dtype=torch.bool)
    return _drawn(flags, index, size, keep)


def _drawn(flags: Tensor, index: int, size: Sequence[int], keep: float) -> Tensor:
    return _empty(size, flags.device).bernoulli_(keep)


def _empty(size: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=device)


def _described(flags: Tensor, index: int, size: Sequence[int], keep: float) -> Tensor:
    return flags.new_empty(size)


_LIBRARY.impl("keep_mask", keep_mask, "CPU")
_LIBRARY.impl("keep_mask", _drawn, "CompositeExplicitAutograd")
_LIBRARY.impl("keep_mask", _described, "Meta")

_KEEP_MASK = torch.ops.compile_modes.keep_mask.default


def _operand(site: Site) -> Any:
    return site.node.args[0]  # "input", or "self" where the op writes to it


def why_no_data(site: Site) -> str:
    """Why the mode of a site can't be data; empty if it can."""
    if site.op.overload not in _DROPOUTS:
        return "it is no dropout" if site.op.family != "attention" else "the probability that it is given is a number"
    if site.body.caller is not None:
        return "it is in the body of a region, which takes no flags"
    if isinstance(site.p, fx.Node) or not isinstance(site.p, float | int):
        return "its probability is computed, or lost"
    value = _compat.value(_operand(site))
    if not isinstance(value, _compat.FakeTensor) or not value.dtype.is_floating_point or value.is_nested:
        return "its input is no plain tensor"
    if not _is_dense(value):
        return "its input has gaps in memory, which eval hands on and train does not"
    if not _DROPOUTS[site.op.overload].in_place and shares_writes(site.node, _DROPOUTS):
        return "eval mode hands its input on, and something writes to that in place or returns it"
    return ""


@dataclass
class Mask:
    """A mask that is drawn ahead of the graph.

    Attributes:
        index: the position of the flag.
        keep: the probability of True.
        size: its size; of a dimension that varies, the input of the graph that says it, as ``~position``.
        device: where it lies.
    """

    index: int
    keep: float
    size: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        self._varies = any(n < 0 for n in self.size)

    def draw(self, flags: Sequence[bool], args: Sequence[Any], idle: dict[tuple[int, ...], Tensor]) -> Tensor:
        """What the graph is given in a call with ``args``: all True, from ``idle``, if the flag is not set."""
        size = tuple([n if n >= 0 else args[~n] for n in self.size]) if self._varies else self.size
        if flags[self.index]:
            return _empty(size, self.device).bernoulli_(self.keep)
        if (ones := idle.get(size)) is None:
            if len(idle) >= _IDLE:
                idle.clear()
            with torch.inference_mode(False):
                ones = idle[size] = torch.ones(size, dtype=torch.bool, device=self.device)
        return ones


_IDLE = 64  # sizes, of masks that drop nothing


@dataclass
class Inputs:
    """The inputs that a graph has got: a vector of flags, then masks; with the fake tensors that describe them."""

    fakes: list[Tensor] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)

    def reading(self, compiled: Callable[..., Any], modules: Iterable[nn.Module]) -> Callable[..., Any]:
        """Calls with flags, as they are now, and with masks as last arguments.

        The flags are made anew when one has changed. The last ones are left as they are: a backward pass may still
        need them.
        """
        references: list[Any] = [weakref.ref(module) for module in modules]  # guards keep calls of dead modules away
        masks, device = self.masks, self.fakes[0].device
        idle: dict[tuple[int, ...], Tensor] = {}
        last: tuple[list[bool], Any] = ([], None)

        def run(*args: Any) -> Any:
            nonlocal last
            flags, current = [reference().training for reference in references], last
            if flags != current[0]:
                with torch.inference_mode(False):
                    last = current = flags, torch.tensor(flags, dtype=torch.bool, device=device)
            return compiled(*args, current[1], *[mask.draw(flags, args, idle) for mask in masks])

        return run


def as_data(graph: fx.GraphModule, chosen: Mapping[Site, int]) -> Inputs:
    """Rewrites dropouts, in place, so that new last inputs of the graph say in which mode they are.

    Args:
        graph: a captured graph, which autograd has not seen.
        chosen: the sites, none of which :func:`why_no_data` objects to, all on one device; each with the position of
            its flag.

    Returns:
        The new inputs; none if there is nothing to do.
    """
    added = Inputs()
    if not chosen:
        return added
    like = _compat.value(_operand(next(iter(chosen))))
    sizes = {s: _size_of(_compat.value(_operand(s)), _kind(s).features) for s in chosen if 0 < (s.p or 0) < 1}
    ahead = _ahead(graph, chosen, sizes)
    with like.fake_mode:
        added.fakes.append(torch.zeros(1 + max(chosen.values()), dtype=torch.bool, device=like.device))
    flags = add_input(graph.graph, "mode_flags", added.fakes[0])
    for site, index in chosen.items():
        mask = None
        if site in ahead:
            added.masks.append(Mask(index, 1 - float(site.p or 0), ahead[site], like.device))
            with like.fake_mode:
                added.fakes.append(_empty(sizes[site], like.device))
            mask = add_input(graph.graph, "keep_mask", added.fakes[-1])
        if site.p:
            _rewrite(site, flags, index, mask)
        else:  # the same in both modes
            _replace(site, _operand(site))
    graph.recompile()
    return added


def _size_of(x: Tensor, features: bool) -> list[Any]:
    """The size of a mask, its dimensions in the order in which eager's lie in memory."""
    return [*x.shape[:2], *[1] * (x.ndim - 2)] if features else [x.shape[d] for d in _memory_order(x)]


def _ahead(
    graph: fx.GraphModule, chosen: Mapping[Site, int], sizes: Mapping[Site, Sequence[Any]]
) -> dict[Site, tuple[int, ...]]:
    """The sizes of the masks, if all can be drawn ahead of the graph, in the notation of :class:`Mask`; or none."""
    nodes = [n for part in graph.modules() if isinstance(part, fx.GraphModule) for n in part.graph.nodes]
    own = {site.node for site in chosen}
    if _compat.draws_as_eager() and any(_compat.draws_random_numbers(n.target) for n in nodes if n not in own):
        return {}
    inputs = [_compat.value(node) for node in graph.graph.find_nodes(op="placeholder")]
    said = {str(value): position for position, value in reversed(list(enumerate(inputs))) if _is_symbol(value)}
    found = {}
    for site, size in sizes.items():
        if not all(type(n) is int or str(n) in said for n in size):
            return {}
        found[site] = tuple([n if type(n) is int else ~said[str(n)] for n in size])
    return found


def _kind(site: Site) -> _Kind:
    return _DROPOUTS[site.op.overload]


def _is_symbol(value: Any) -> bool:
    return isinstance(value, torch.SymInt) and str(value).isidentifier()


def _rewrite(site: Site, flags: fx.Node, index: int, mask: fx.Node | None) -> None:
    kind, p = _kind(site), float(site.p or 0.0)

    def apply(x: Tensor, flags: Tensor, *masks: Tensor) -> tuple[Tensor]:
        one = x.new_ones(())
        if p == 1:
            return (_times(x, torch.where(flags[index], one - one, one), kind.in_place),)
        drawn = masks[0] if masks else _KEEP_MASK(flags, index, _size_of(x, kind.features), 1 - p)
        drawn = drawn if kind.features else _as_in_memory(drawn, x)
        if kind.alpha:
            y = _selu(x, drawn, flags[index], p)
            return (x.copy_(y) if kind.in_place else y,)
        scale = torch.where(flags[index], one / (1 - p), one)
        return (_times(x, torch.where(drawn, scale, 0.0), kind.in_place),)

    operands = [_operand(site), flags] if mask is None else [_operand(site), flags, mask]
    (result,) = insert_traced(site.node, site.node, apply, operands)
    _replace(site, result)


def _times(x: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    return x.mul_(factor) if in_place else x * factor


def _replace(site: Site, value: Any) -> None:
    site.node.replace_all_uses_with(value)
    site.node.graph.erase_node(site.node)


def _as_in_memory(mask: Tensor, x: Tensor) -> Tensor:
    """A mask whose dimensions stand as those of ``x`` lie in memory, in the order of ``x``."""
    order = _memory_order(x)
    return mask if order == sorted(order) else mask.permute([order.index(d) for d in range(x.ndim)])


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of a dense tensor, the outermost in memory first; otherwise as they come."""
    plain = list(range(x.ndim))
    if not all(type(number) is int for number in (*x.shape, *x.stride())):
        return plain
    strides = x.stride()
    order = sorted(plain, key=lambda d: (-strides[d], d))
    return order if x.permute(order).is_contiguous() else plain


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor is known to lie in memory without gaps: train then gives its result the same strides."""
    if all(type(number) is int for number in (*x.shape, *x.stride())):
        return x.numel() < 2 or x.permute(_memory_order(x)).is_contiguous()
    formats = [torch.contiguous_format, *([torch.channels_last] if x.ndim == 4 else [])]
    return any(x.is_contiguous(memory_format=layout) for layout in formats)


def _selu(x: Tensor, mask: Tensor, flag: Tensor, p: float) -> Tensor:
    a = 1.0 / ((_ALPHA * _ALPHA * p + 1) * (1 - p)) ** 0.5
    noise = mask.to(x.dtype)
    return torch.where(flag, x * (noise * a) + ((noise - 1) * (_ALPHA * a) + _ALPHA * a * p), x)
