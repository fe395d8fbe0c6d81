"""Eval-mode batch norms that autograd follows, computed by the convolution in front of them.

Eager keeps the convolution's output for the gradient of the norm's weight. But the pair is also one convolution with
weight ``w * s``, ``s = gamma * rsqrt(var + eps)``, and bias ``(b - mean) * s + beta``. Gradients reach ``w``, ``b``,
``gamma`` and ``beta`` through these products, for which nothing of the size of the output is kept (You et al.,
"Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024). The price is work on weights, in the forward
pass and again in the backward pass, so that it pays where outputs are many against weights.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy

from compile_modes import _compat
from compile_modes.forms.saved_reads import written_values
from compile_modes.graph import calls
from compile_modes.graph.edits import insert_traced
from compile_modes.graph.effects import has_effect, is_view, named_arguments
from compile_modes.graph.followed import followed_by_autograd
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View

aten = torch.ops.aten

# What can take over a batch norm, with the dimension of its weight that counts output channels.
_CHANNELS: dict[Any, int] = {
    aten.linear.default: 0,
    aten.conv1d.default: 0, aten.conv1d.padding: 0,
    aten.conv2d.default: 0, aten.conv2d.padding: 0,
    aten.conv3d.default: 0, aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1, aten.conv_transpose3d.input: 1,
}  # fmt: skip

# What the ops behind the norm need in the backward pass decides whether anything is gained. Stock keeps the input of
# the norm, and computes from it again whatever Inductor fuses, such as the input of a SiLU, a GELU or a gate. To keep
# the norm's output instead is no gain. These need no input, only the output or a mask, and gain what follows gains.
_PASSES_ON = frozenset(
    {
        aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default,
        aten.relu6.default, aten.relu6_.default,
        aten.leaky_relu.default, aten.leaky_relu_.default, aten.hardsigmoid.default, aten.hardsigmoid_.default,
        aten.sigmoid.default, aten.sigmoid_.default, aten.tanh.default, aten.tanh_.default, aten.clamp.default,
        aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.cat.default,
        aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default,
    }
)  # fmt: skip
# These need no value at all, or indices, whatever comes behind.
_ENDS = frozenset(
    {
        aten.mean.default, aten.mean.dim, aten.sum.default, aten.sum.dim_IntList, aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default, aten.max_pool2d.default, aten.detach.default,
    }
)  # fmt: skip
_RELUS = frozenset({aten.relu.default, aten.relu_.default})
# These read their input from memory, so that stock keeps it beside the input of the norm.
_READS_INPUT = frozenset({*_CHANNELS, aten.matmul.default})

# How many outputs a convolution must have for each of its weights. With fewer, steps take longer: resnet18 with all its
# norms folded takes 1.1 to 1.2 times as long, for a few percent of memory.
_OUTPUTS_PER_WEIGHT = 0.2


@dataclass(eq=False)
class Pair:
    """A batch norm and what computes its input; ``why_not`` is empty if that can take the norm over."""

    site: Site
    linear: fx.Node
    why_not: str = ""

    @property
    def form(self) -> str:
        """What becomes of the norm, in words."""
        return f"as it is: {self.why_not}" if self.why_not else f"folded into {self.linear.name}"

    def operands(self) -> dict[str, fx.Node | None]:
        """What the new weight and bias are computed from."""
        own = arguments(self.linear)
        norm = {name: self.site.read(name) for name in ("running_mean", "running_var")}
        return {
            "w": own["weight"],
            "b": own["bias"],
            "gamma": self.site.read("weight"),
            "beta": self.site.read("bias"),
        } | norm


def tune(view: View, found: Iterable[Site]) -> list[Pair]:
    """Folds, in place, each batch norm in eval mode into the convolution in front of it, where it pays.

    The edited graph computes what the graph did, gradients included, up to rounding. New nodes are tagged to be
    computed again in the backward pass, or the partitioner would save weights of its own instead of outputs. A norm
    stays as it is wherever :func:`_why_not` has a reason.

    Args:
        view: a captured graph, its sites in their final modes.
        found: its sites.

    Returns:
        All pairs of a convolution and a norm in eval mode, each with the reason why it stays, if it does.
    """
    pairs = list(_find(found))
    if not pairs:
        return []
    followed = followed_by_autograd(view.bodies)
    written = set(written_values(view, found))
    gaining = _gaining(view.main.graph, followed)
    for pair in pairs:
        pair.why_not = _why_not(pair, followed, written, gaining)
    for pair in pairs:
        if not pair.why_not:
            _fold(pair)
    return pairs


def _find(found: Iterable[Site]) -> Iterator[Pair]:
    for site in found:
        if site.op.overload is aten.batch_norm.default and site.training is False and not site.modeless:
            linear = site.read("input")
            if linear.op == "call_function" and linear.target in _CHANNELS:
                yield Pair(site, linear)


def _why_not(pair: Pair, followed: set[fx.Node], written: set[fx.Node], gaining: set[fx.Node]) -> str:
    """Why a pair stays as it is; empty if nothing speaks against folding it. Changes nothing."""
    site, linear = pair.site, pair.linear
    operands = pair.operands()
    if site.body.caller is not None:
        return "it is in the body of a region, which autograd may not see node by node"
    if list(linear.users) != [site.node] or site.node.all_input_nodes.count(linear) > 1:
        return "the input of the norm is used elsewhere"
    if site.node not in followed or operands["gamma"] not in followed:
        return "the weight of the norm needs no gradient, and nothing is saved for it"
    if operands["w"] not in followed:
        return "the weight in front needs no gradient, which would have to be computed"
    return _unfit(pair) or _unsafe(pair, operands, written) or _no_gain(pair, gaining)


def _unfit(pair: Pair) -> str:
    """What the shapes and types of the pair have against it."""
    linear = pair.linear
    own = arguments(linear)
    value, weight, result = (_compat.value(n) for n in (own["input"], own["weight"], linear))
    if value.ndim != weight.ndim:
        return "its input has no batch dimension, or more dimensions than weights"
    if _CHANNELS[linear.target] == 1 and own["groups"] != 1:
        return "a transposed convolution in groups has its channels in another order"
    if not result.dtype.is_floating_point or _compat.value(pair.site.node).dtype != result.dtype:
        return "the norm gives another type than it is given"
    return ""


def _unsafe(pair: Pair, operands: Mapping[str, fx.Node | None], written: set[fx.Node]) -> str:
    """Why the new weight could come out otherwise, in the forward pass or when it is computed again."""
    view = pair.site.body.view
    origins = {name: view.origin(node) for name, node in operands.items() if node is not None}
    computed = [name for name, node in origins.items() if node is None or node.op not in ("placeholder", "get_attr")]
    if computed:
        return f"{computed[0]} is computed in the graph"
    paths = {view.state[node] for node in written} - {None}
    if any(node in written or view.state[node] in paths for node in origins.values()):
        return "the graph writes to a parameter or to statistics of the pair"
    between = takewhile(lambda node: node is not pair.site.node, _after(pair.linear))
    if any(_may_interfere(view, node) for node in between):
        return "something that may write, or switches a mode of torch, stands between the two"
    return ""


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        node = node.next
        yield node


def _may_interfere(view: View, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem or calls.is_counter(node):
        return False
    return not isinstance(node.target, OpOverload) or has_effect(view.root, node)


def _no_gain(pair: Pair, gaining: set[fx.Node]) -> str:
    if pair.site.node not in gaining:
        return "what follows computes the output of the norm again from its input, and saves nothing else"
    outputs = _compat.numel_at_least(_compat.value(pair.linear).shape)
    weights = _compat.value(arguments(pair.linear)["weight"]).numel()
    if not isinstance(weights, int) or outputs < weights * _OUTPUTS_PER_WEIGHT:
        return f"{outputs} outputs, or more, are too few for {weights} weights"
    return ""


def _gaining(graph: fx.Graph, followed: set[fx.Node]) -> set[fx.Node]:
    """The nodes for whose values nothing is saved that would not be saved anyway, were they not computed again."""
    gaining: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if user in followed or user.op == "output"]
        kept = any(user.op == "output" or user.target in _READS_INPUT for user in users)
        if kept or all(_gains(node, user, followed, gaining) for user in users):
            gaining.add(node)
    return gaining


def _gains(node: fx.Node, user: fx.Node, followed: set[fx.Node], gaining: set[fx.Node]) -> bool:
    if user.target in _ENDS:
        return True
    if user.target in (aten.mul.Tensor, aten.div.Tensor):
        passes = user.args[0] is node and user.args[1] not in followed
    else:
        passes = user.target in _PASSES_ON or is_view(user.target)
    return passes and user in gaining


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a node is called with, by the names of its schema, defaults included."""
    assert isinstance(node.target, OpOverload)
    return {a.name: a.default_value for a in node.target._schema.arguments} | named_arguments(node)


def _fold(pair: Pair) -> None:
    """Gives the convolution its new weight, and puts what it returns, with the new bias added, into the norm's place.

    Inductor fuses the sum with what follows, in both passes, which is faster than the convolution's own bias.
    """
    site, linear = pair.site, pair.linear
    given = {name: node for name, node in pair.operands().items() if node is not None}
    result, eps = _compat.value(linear), float(site.read("eps"))

    def products(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = _products(dict(zip(given, values, strict=True)), _CHANNELS[linear.target], eps)
        return weight.to(result.dtype), bias.reshape(-1, *[1] * (result.ndim - 2))  # weight: as autocast would have it

    def shifted(value: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor]:
        return ((value + bias).to(result.dtype),)

    last = linear.prev
    weight, bias = insert_traced(linear, site.node, products, list(given.values()))
    for node in takewhile(lambda node: node is not linear, _after(last)):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    _call_with(linear, weight=weight, bias=None)
    (value,) = insert_traced(site.node, site.node, shifted, [linear, bias])
    site.node.replace_all_uses_with(value)
    site.node.graph.erase_node(site.node)
    _pool_first(value)


def _pool_first(value: fx.Node) -> None:
    """Puts a ReLU of a value behind the max pool that alone takes it: the same results and gradients, less work.

    The largest of a window is the same before and after a ReLU, which keeps order; where it is not above zero, no
    gradient passes either way. What is kept of the ReLU for the backward pass shrinks with it, to nothing where the
    next op keeps its result. Stock has the input of the norm, to compute everything from, and needs no mask.
    """
    relu = _only_user(value)
    pool = relu and _only_user(relu)
    if relu is None or pool is None or relu.target not in _RELUS or pool.target is not aten.max_pool2d.default:
        return
    with pool.graph.inserting_after(pool):
        after = pool.graph.call_function(aten.relu.default, (pool,))
    after.meta = dict(pool.meta)
    pool.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    pool.replace_input_with(relu, value)
    pool.graph.erase_node(relu)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _products(given: Mapping[str, torch.Tensor], channels: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the bias that stand for both, in float32 or more."""
    precise = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in given.items()}
    s = precise["gamma"] * torch.rsqrt(precise["running_var"] + eps)
    shift = -precise["running_mean"] if "b" not in given else precise["b"] - precise["running_mean"]
    bias = shift * s if "beta" not in given else shift * s + precise["beta"]
    shape = [1] * given["w"].ndim
    shape[channels] = -1
    return precise["w"] * s.reshape(shape), bias


def _call_with(node: fx.Node, **changed: Any) -> None:
    """Changes arguments of a node, by the names of its schema."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    given = named_arguments(node) | changed
    node.args = tuple(given.pop(name) for name in takewhile(set(given).__contains__, names))
    node.kwargs = given
