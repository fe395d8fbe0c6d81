"""THE table: what train/eval means for every ATen overload that carries a mode.

One row per operator overload. The rest of the package asks :func:`lookup`; argument positions come from the
operator's schema, so a row only names arguments. A test walks all ``aten::`` schemas and fails on a
mode-carrying overload that has no row here.

Deliberately *not* in the table:

- ``bernoulli``, ``rand`` and friends: sampling, whose meaning (a DropPath mask, a VAE) is not in the operator. What is
  known to be a mask is folded into a call of ``calls.noise``, which is in the table; see ``regions.py``.
- ``fused_moving_avg_obs_fake_quant`` and other observers: switched by their own flags, not by train/eval.
- ``batch_norm_stats``, ``batch_norm_elemt``, ``batch_norm_gather_stats``: the pieces of CUDA SyncBatchNorm,
  reached only in train; eval runs another program (``batch_norm``).
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from compile_modes import messages
from compile_modes._compat import aten_overload, draws_random_numbers
from compile_modes.graph import calls
from compile_modes.graph.cumulative import CUMULATIVE_BATCH_NORM

STATS = ("running_mean", "running_var")

_KERNEL = messages.KERNEL.reason()
_BACKWARD = messages.BACKWARD.reason()
_DECOMPOSED = messages.DECOMPOSED.reason()
_FUSED = messages.FUSED.reason()
_QUANTIZED = messages.QUANTIZED.reason()


@dataclass(frozen=True)
class ModeOp:
    """One mode-carrying operator overload.

    Attributes:
        overload: the operator, or the function of ``calls.py``.
        family: dropout, batch_norm, instance_norm, rrelu, rnn, attention, noise, spectral_norm or switch.
        flag: name of the boolean argument that is the mode; None if there is none.
        p: name of the probability argument. Without a flag it is the mode itself: 0 in eval, positive in train.
        stats: names of the running statistics; None operands there mean batch statistics in both modes.
        counter: whether eager advances the owner's ``num_batches_tracked`` beside this op, not in it, in train.
        shown: further literals worth showing (momentum, eps).
        modeless: the op computes the same in both modes, whatever its flag says.
        inference: eager reaches the op in eval only, and another program in train.
        decomposed: the op comes from ``run_decompositions()``; hardly anyone calls it directly.
        whole: name of the op in training IR that this one is a decomposition of; it takes the same arguments.
        implied: the mode that the op's name says; None if an argument says it.
        refusal: why the op is never switched, a reason of the catalogue; empty if it can be.
    """

    overload: OpOverload | Callable[..., Any]
    family: str
    flag: str | None = None
    p: str | None = None
    stats: tuple[str, ...] = ()
    counter: bool = False
    shown: tuple[str, ...] = ()
    modeless: bool = False
    decomposed: bool = False
    inference: bool = False
    whole: str = ""
    implied: bool | None = None
    refusal: str = ""
    arguments: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.overload, OpOverload):
            self.arguments.update({a.name: a.default_value for a in self.overload._schema.arguments})
        else:
            parameters = inspect.signature(self.overload).parameters.values()
            self.arguments.update({p.name: None if p.default is p.empty else p.default for p in parameters})
        for name in (self.flag, self.p, *self.stats, *self.shown):
            if name is not None and name not in self.arguments:
                raise ValueError(f"{self} has no argument {name!r}; it has {', '.join(self.arguments)}")

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """The value of argument ``name`` in a call, schema default included."""
        if name in kwargs:
            return kwargs[name]
        index = self.index(name)
        return args[index] if index < len(args) else self.arguments[name]

    def has(self, name: str) -> bool:
        """Whether the schema has an argument ``name``."""
        return name in self.arguments

    def index(self, name: str) -> int:
        """Position of argument ``name`` in the schema."""
        return list(self.arguments).index(name)

    def default(self, name: str) -> Any:
        """Schema default of argument ``name``; None where it has none."""
        return self.arguments[name]

    def __str__(self) -> str:
        return str(self.overload) if isinstance(self.overload, OpOverload) else self.overload.__name__

    def new_state(self, name: str) -> int | None:
        """Which output is the new value of the statistics ``name``; None if the op does not return any."""
        outputs = [r.name for r in self.overload._schema.returns] if isinstance(self.overload, OpOverload) else []
        return outputs.index(name + "_out") if name + "_out" in outputs else None

    def recomposed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
    ) -> tuple[OpOverload, list[Any]]:
        """The op that this one is a decomposition of, and the arguments for it: from ``given``, or as in this call."""
        whole = aten_overload(self.whole)
        assert whole is not None, f"{self.overload} is no decomposition"
        names = [argument.name for argument in whole._schema.arguments]
        return whole, [given[name] if name in given else self.read(args, kwargs, name) for name in names]


Rows = Iterator[tuple[str, dict[str, Any]]]


def _rows() -> Rows:
    yield from _dropout_rows()
    yield from _norm_rows()
    for name in ("rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise.out", "rrelu_with_noise_"):
        yield name, {"family": "rrelu", "flag": "training"}
    functional = {"family": "rrelu", "flag": "training", "decomposed": True, "whole": "rrelu"}
    yield "rrelu_with_noise_functional", functional
    yield from _rnn_rows()
    yield from _attention_rows()
    yield from _backward_rows()


def _dropout_rows() -> Rows:
    dropout = {"family": "dropout", "flag": "train", "p": "p"}
    for stem in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
        yield stem, dropout
        yield stem + "_", dropout
    for name in ("native_dropout", "native_dropout.out"):
        yield name, {**dropout, "decomposed": True}  # train is bool?; None means train
    for name in ("_fused_dropout", "_fused_dropout.out"):
        yield name, {"family": "dropout", "p": "p", "refusal": _KERNEL}


def _norm_rows() -> Rows:
    norm = {"family": "batch_norm", "counter": True, "stats": STATS}
    plain = {**norm, "flag": "training", "shown": ("momentum", "eps")}
    for name in (
        "batch_norm",
        "native_batch_norm",
        "native_batch_norm.out",
        "_batch_norm_impl_index",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit.out",
    ):
        yield name, plain
    vendor = {**norm, "flag": "training", "shown": ("exponential_average_factor", "epsilon")}
    for name in ("cudnn_batch_norm", "cudnn_batch_norm.out", "miopen_batch_norm", "miopen_batch_norm.out"):
        yield name, vendor
    for name in ("no_stats", "no_stats_out"):
        columns = {"family": "batch_norm", "flag": "training", "modeless": True, "decomposed": True}
        yield f"_native_batch_norm_legit.{name}", columns
    apart = {**norm, "shown": ("momentum", "eps"), "decomposed": True, "refusal": _DECOMPOSED}
    yield "_native_batch_norm_legit_functional", {**apart, "flag": "training", "whole": "batch_norm"}
    yield "_batch_norm_with_update_functional", {**apart, "implied": True, "whole": "batch_norm"}
    in_name = {"_native_batch_norm_legit_no_training": False, "_batch_norm_no_update": False,
               "_batch_norm_with_update": True}  # fmt: skip
    for stem, implied in in_name.items():
        yield stem, {**apart, "implied": implied, "whole": "batch_norm"}
        yield stem + ".out", {**apart, "implied": implied}
    # No counter: eager's InstanceNorm never advances num_batches_tracked.
    instance = {"family": "instance_norm", "flag": "use_input_stats", "stats": STATS, "shown": ("momentum", "eps")}
    yield "instance_norm", instance


def _rnn_rows() -> Rows:
    rnn = {"family": "rnn", "flag": "train", "p": "dropout"}
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        yield f"{cell}.input", rnn
        yield f"{cell}.data", rnn
    for cell in ("quantized_lstm", "quantized_gru"):
        for name in ("input", "data", "input_legacy", "data_legacy"):
            yield f"{cell}.{name}", {**rnn, "refusal": _QUANTIZED}
    for name in ("_cudnn_rnn", "miopen_rnn", "_lstm_mps", "_cudnn_init_dropout_state"):
        yield name, {**rnn, "refusal": _KERNEL}
        yield name + ".out", {**rnn, "refusal": _KERNEL}
    for name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer.out"):
        yield name, {"family": "rnn", "flag": "train", "refusal": _KERNEL}


def _attention_rows() -> Rows:
    attention = {"family": "attention", "p": "dropout_p"}
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention.quantized",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_flash_attention_forward.quantized",
        "_efficient_attention_forward",
        "_cudnn_attention_forward",
        "_triton_scaled_dot_attention",
        "_triton_scaled_dot_attention.out",
    ):
        yield name, {**attention, "decomposed": name != "scaled_dot_product_attention"}
    for name in ("_fused_sdp_choice", "_fill_mem_eff_dropout_mask_", "_flash_attention_forward_no_dropout_inplace"):
        yield name, {**attention, "refusal": _KERNEL}
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_triton_multi_head_attention"):
        yield name, {"family": "attention", "inference": True, "refusal": _FUSED}
        yield name + ".out", {"family": "attention", "inference": True, "refusal": _FUSED}


def _backward_rows() -> Rows:
    norm = {"family": "batch_norm", "flag": "train", "refusal": _BACKWARD}
    for name in ("native_batch_norm_backward", "native_batch_norm_backward.out", "_batch_norm_impl_index_backward"):
        yield name, norm
    for name in ("rrelu_with_noise_backward", "rrelu_with_noise_backward.out"):
        yield name, {"family": "rrelu", "flag": "training", "refusal": _BACKWARD}
    rnn = {"family": "rnn", "flag": "train", "refusal": _BACKWARD}
    for name in ("_cudnn_rnn_backward", "miopen_rnn_backward", "lstm_mps_backward"):
        yield name, {**rnn, "p": "dropout"}
        yield name + ".out", {**rnn, "p": "dropout"}
    for name in ("mkldnn_rnn_layer_backward", "mkldnn_rnn_layer_backward.out"):
        yield name, rnn
    for name in (
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable_backward",
        "_flash_attention_backward",
        "_efficient_attention_backward",
        "_cudnn_attention_backward",
    ):
        yield name, {"family": "attention", "p": "dropout_p", "refusal": _BACKWARD}


def _own_rows() -> Iterator[ModeOp]:
    """Rows of this package's own operators and functions."""
    # No counter: the operator advances its num_batches_tracked itself, so no step may stand beside it.
    yield ModeOp(CUMULATIVE_BATCH_NORM, "batch_norm", flag="training", stats=STATS, shown=("eps",))
    yield ModeOp(calls.noise, "noise", flag="training")
    yield ModeOp(calls.power_iteration, "spectral_norm", flag="training")
    yield ModeOp(calls.switch, "switch", flag="training")


def _build() -> dict[Any, ModeOp]:
    table: dict[Any, ModeOp] = {row.overload: row for row in _own_rows()}
    for name, columns in _rows():
        overload = aten_overload(name)
        if overload is None:  # not in this torch: private kernels come and go between releases
            continue
        if overload in table:
            raise ValueError(f"two rows for aten::{name} in the table of mode-dependent ops")
        table[overload] = ModeOp(overload, **columns)
    return table


TABLE = _build()

# What a graph says of a mode by lacking something. No rows: the ops themselves mean the same in both modes.
LOST_DROPOUT = ModeOp(torch.ops.aten.softmax.int, "attention", refusal=messages.LOST_DROPOUT.reason())
LOST_ITERATION = ModeOp(torch.ops.aten.vdot.default, "spectral_norm", refusal=messages.LOST_ITERATION.reason())
STUCK_ITERATION = ModeOp(torch.ops.aten.vdot.default, "spectral_norm", refusal=messages.STUCK_ITERATION.reason())

UNTRACKED = ModeOp(torch.ops.aten.batch_norm.default, "batch_norm", refusal=messages.UNTRACKED.reason())


def lookup(target: Any) -> ModeOp | None:
    """The row of a node's target, or None if the op means the same in both modes."""
    return TABLE.get(target) if callable(target) else None


def is_sampler(target: Any) -> bool:
    """Whether an op that has no row draws random numbers."""
    return draws_random_numbers(target) and target not in TABLE
