"""One case for each module class of torch and torchvision whose behaviour depends on mode, and a few beside them.

No probability, eps or momentum is at its default.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.nn import intrinsic, quantizable
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig

import compile_modes as cm

try:
    from torchvision import ops as vision
except ImportError:
    vision = None

SWITCHES = ""
# Python control flow, of which an export keeps one side: the bound module stays in the mode that it was exported in.
FROZEN = "frozen"
GONE = "left nothing in the eval export"
LOST_P = "dropout_p is 0: the op had none, or .* its p is lost"
SPECTRAL_NORM_HOOK = sys.modules["torch.nn.utils.spectral_norm"].SpectralNorm  # the function hides its module
RRELU = {"lower": 0.2, "upper": 0.4}
NORM = {"eps": 1e-3, "momentum": 0.3}


@dataclass(frozen=True)
class Case:
    """A module and what is expected of its exports.

    Attributes:
        name: unique, for ``-k``.
        build: makes the module.
        shapes: of its inputs.
        train: what binding its train export gives: SWITCHES, FROZEN, or a pattern for the reason that bind warns of.
        eval: the same of its eval export.
        covers: classes that the case is for, besides the class of the module itself.
        around: what it must be exported in.
        strict: whether it is exported strictly.
        tolerance: largest difference to eager.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    train: str = SWITCHES
    eval: str = SWITCHES
    covers: tuple[type, ...] = ()
    around: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    strict: bool = False
    tolerance: float = 0.0


class Wrapped(nn.Module):
    """The module of a case below a parameter of its own, so that there always is something to train."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.module = module

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
        output = self.module(x * self.gain, *more)
        return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf is not None]


def materialised(lazy: nn.Module, *shape: int) -> nn.Module:
    lazy(torch.zeros(shape))
    return lazy


def quantization_aware(kind: Any, *args: Any, **options: Any) -> nn.Module:
    module = kind(*args, **NORM, qconfig=get_default_qat_qconfig("fbgemm"), **options)
    if isinstance(module.bias, nn.Parameter):
        nn.init.zeros_(module.bias)  # qat.LinearBn1d leaves it uninitialised
    return module


class Attends(nn.Module):
    """Self-attention with what ``MultiheadAttention.forward`` is asked for."""

    def __init__(self, attention: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x: torch.Tensor) -> Any:
        return self.attention(x, x, x, need_weights=self.need_weights)


class DropPath(nn.Module):
    """As in timm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        return x * mask.div_(0.7)


class Functional(nn.Module):
    """Functions that take the mode as an argument."""

    def __init__(self, function: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.training)


SIZES = {1: (4, 3, 6), 2: (4, 3, 4, 4), 3: (2, 3, 4, 4, 4)}


def cases() -> Iterator[Case]:
    yield from _dropouts()
    yield from _norms()
    yield from _recurrent()
    yield from _attention()
    yield from _fused()
    yield from _reparametrised()
    yield from _random_in_both_modes()
    if vision is not None:
        yield from _vision()


def _dropouts() -> Iterator[Case]:
    for kind, shape in (
        (nn.Dropout, (4, 5)),
        (nn.Dropout1d, SIZES[1]),
        (nn.Dropout2d, SIZES[2]),
        (nn.Dropout3d, SIZES[3]),
        (nn.AlphaDropout, (4, 5)),
        (nn.FeatureAlphaDropout, SIZES[2]),
    ):
        for inplace in (False, True):
            yield Case(_name(kind, inplace=inplace), lambda k=kind, i=inplace: k(0.3, inplace=i), (shape,))
    for inplace in (False, True):
        yield Case(_name(nn.RReLU, inplace=inplace), lambda i=inplace: nn.RReLU(**RRELU, inplace=i), ((4, 5),))
    for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout):
        shape = SIZES[int(function.__name__[7])] if function.__name__[7:8].isdigit() else SIZES[2]
        build = lambda f=function: Functional(lambda x, training: f(x, 0.3, training))  # noqa: E731
        yield Case(f"F.{function.__name__}", build, (shape,))
    yield Case("F.rrelu", lambda: Functional(lambda x, training: F.rrelu(x, 0.2, 0.4, training)), ((4, 5),))


def _norms() -> Iterator[Case]:
    batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    lazy_batch = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    lazy_instance = {1: nn.LazyInstanceNorm1d, 2: nn.LazyInstanceNorm2d, 3: nn.LazyInstanceNorm3d}
    for n, shape in SIZES.items():
        yield Case(batch[n].__name__, lambda k=batch[n]: k(3, **NORM), (shape,))
        build = lambda k=lazy_batch[n], s=shape: materialised(k(**NORM), *s)  # noqa: E731
        yield Case(lazy_batch[n].__name__, build, (shape,), covers=(lazy_batch[n],))
        for tracks in (True, False):
            options = {**NORM, "track_running_stats": tracks, "affine": tracks}
            yield Case(_name(instance[n], tracks=tracks), lambda k=instance[n], o=options: k(3, **o), (shape,))
        build = lambda k=lazy_instance[n], s=shape: materialised(k(**NORM, track_running_stats=True), *s)  # noqa: E731
        yield Case(lazy_instance[n].__name__, build, (shape,), covers=(lazy_instance[n],))
    yield Case("BatchNorm1d-of-features", lambda: nn.BatchNorm1d(3, **NORM), ((4, 3),))
    yield Case("SyncBatchNorm", lambda: nn.SyncBatchNorm(3, **NORM), (SIZES[2],))
    yield Case("BatchNorm-plain", lambda: nn.BatchNorm2d(3, **NORM, affine=False), (SIZES[2],))
    yield Case("BatchNorm-momentum-0", lambda: nn.BatchNorm2d(3, momentum=0.0), (SIZES[2],), eval="momentum 0.0")
    yield Case("BatchNorm-untracked", lambda: nn.BatchNorm2d(3, track_running_stats=False), (SIZES[2],))
    yield Case("BatchNorm-tracking-turned-off", _turned_off, (SIZES[2],), train="track_running_stats was turned off")
    yield Case("InstanceNorm-unbatched", lambda: nn.InstanceNorm1d(3, **NORM, track_running_stats=True), ((3, 6),))
    build = lambda: nn.InstanceNorm2d(3, momentum=None, track_running_stats=True)  # noqa: E731
    yield Case("InstanceNorm-cumulative", build, (SIZES[2],))
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        build = lambda k=kind: k(3, eps=1e-3, momentum=None)  # noqa: E731
        yield Case(_name(kind, cumulative=True), build, (SIZES[2],), around=cm.exportable, tolerance=1e-6)


def _turned_off() -> nn.Module:
    norm = nn.BatchNorm2d(3, **NORM)
    norm.track_running_stats = False  # trains on batch statistics, evaluates with the running ones
    return norm


def _recurrent() -> Iterator[Case]:
    for kind, options in (
        (nn.LSTM, {}),
        (nn.LSTM, {"proj_size": 3}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"batch_first": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ):
        build = lambda k=kind, o=options: k(4, 5, num_layers=2, dropout=0.4, **o)  # noqa: E731
        yield Case(_name(kind, **options), build, ((6, 2, 4),))
    yield Case("GRU-unbatched", lambda: nn.GRU(4, 5, num_layers=2, dropout=0.4), ((6, 4),))


def _attention() -> Iterator[Case]:
    x, options = (2, 5, 8), {"dropout": 0.2, "batch_first": True}
    layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, **options}
    for weights in (False, True):
        build = lambda w=weights: Attends(nn.MultiheadAttention(8, 2, **options), w)  # noqa: E731
        why = LOST_P if not weights else "dropout"
        yield Case(f"Attention-weights-{weights}", build, (x,), eval=why, covers=(nn.MultiheadAttention,))
    build = lambda: Attends(nn.MultiheadAttention(8, 2, batch_first=True), False)  # noqa: E731
    yield Case("Attention-no-dropout", build, (x,), train=LOST_P, eval=LOST_P)  # 0 is 0, whichever mode it is of
    build = lambda: Attends(quantizable.MultiheadAttention(8, 2, **options), True)  # noqa: E731
    yield Case("quantizable.Attention", build, (x,), covers=(quantizable.MultiheadAttention,))
    for first in (False, True):
        build = lambda f=first: nn.TransformerEncoderLayer(**layer, norm_first=f)  # noqa: E731
        yield Case(_name(nn.TransformerEncoderLayer, first=first), build, (x,), eval=LOST_P)
        build = lambda f=first: nn.TransformerDecoderLayer(**layer, norm_first=f)  # noqa: E731
        yield Case(_name(nn.TransformerDecoderLayer, first=first), build, (x, x), eval=LOST_P)
    # Torch's fast path; non-strict export keeps torch from taking it.
    fast = {"eval": "a fused kernel of inference", "around": lambda module: torch.no_grad(), "strict": True}
    yield Case("TransformerEncoderLayer-fast", lambda: nn.TransformerEncoderLayer(**layer), (x,), **fast)
    build = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)  # noqa: E731
    yield Case("TransformerEncoder", build, (x,), eval=LOST_P)
    build = lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2)  # noqa: E731
    yield Case("TransformerDecoder", build, (x, x), eval=LOST_P)
    build = lambda: nn.Transformer(**layer, num_encoder_layers=1, num_decoder_layers=1)  # noqa: E731
    yield Case("Transformer", build, (x, x), eval=LOST_P)


def _fused() -> Iterator[Case]:
    convs = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    for n, shape in SIZES.items():
        for end in ("", "ReLU"):
            name = f"ConvBn{end}{n}d"
            relu = [nn.ReLU()] if end else []
            kind = getattr(intrinsic, name)
            build = lambda k=kind, n=n, r=relu: k(convs[n](3, 3, 1), norms[n](3, **NORM), *r)  # noqa: E731
            yield Case(f"intrinsic.{name}", build, (shape,))
            build = lambda k=getattr(qat, name): quantization_aware(k, 3, 3, 1)  # noqa: B008, E731
            yield Case(f"qat.{name}", build, (shape,))
        if n > 1:
            kind = getattr(intrinsic, f"BNReLU{n}d")
            build = lambda k=kind, n=n: k(norms[n](3, **NORM), nn.ReLU())  # noqa: E731
            yield Case(f"intrinsic.{kind.__name__}", build, (shape,))
    build = lambda: intrinsic.LinearBn1d(nn.Linear(5, 3), nn.BatchNorm1d(3, **NORM))  # noqa: E731
    yield Case("intrinsic.LinearBn1d", build, ((4, 5),))
    yield Case("qat.LinearBn1d", lambda: quantization_aware(qat.LinearBn1d, 5, 3), ((4, 5),))
    build = lambda: quantization_aware(qat.ConvBn2d, 3, 3, 1, freeze_bn=True)  # noqa: E731
    own = r"train\(\) (is overridden by|of) ConvBn2d"
    yield Case("qat.ConvBn2d-frozen", build, (SIZES[2],), train=own, eval=own)
    yield Case("qat.ConvBn2d-slow", _slow, (SIZES[2],), train=FROZEN, eval=FROZEN)


def _slow() -> nn.Module:
    module = quantization_aware(qat.ConvBn2d, 3, 3, 1)
    module._enable_slow_path_for_better_numerical_stability = True
    return module


def _reparametrised() -> Iterator[Case]:
    for name, function, kind in (
        ("hook", nn.utils.spectral_norm, SPECTRAL_NORM_HOOK),
        ("parametrization", nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations._SpectralNorm),
    ):
        for layer, args, shape in ((nn.Linear, (5, 3), (4, 5)), (nn.Conv2d, (3, 4, 1), SIZES[2])):
            build = lambda f=function, k=layer, a=args: f(k(*a), eps=1e-6)  # noqa: E731
            why = "power iteration"
            yield Case(f"spectral-{name}-{layer.__name__}", build, (shape,), eval=why, covers=(kind,))


def _random_in_both_modes() -> Iterator[Case]:
    yield Case("FractionalMaxPool2d", lambda: nn.FractionalMaxPool2d(2, output_size=3), ((2, 3, 6, 6),))
    yield Case("FractionalMaxPool3d", lambda: nn.FractionalMaxPool3d(2, output_ratio=0.6), ((2, 3, 5, 5, 5),))
    yield Case("gumbel-softmax", lambda: Functional(lambda x, training: F.gumbel_softmax(x, tau=0.7)), ((4, 5),))
    yield Case("DropPath", DropPath, (SIZES[2],), eval=GONE)


def _vision() -> Iterator[Case]:
    for mode in ("row", "batch"):
        yield Case(f"StochasticDepth-{mode}", lambda m=mode: vision.StochasticDepth(0.3, m), (SIZES[2],), eval=GONE)
    for n in (2, 3):
        kind = getattr(vision, f"DropBlock{n}d")
        yield Case(kind.__name__, lambda k=kind: k(0.3, 3), (SIZES[n],), eval=GONE)
    yield Case("vision.MLP", lambda: vision.MLP(5, [6, 4], dropout=0.3), ((4, 5),))
    for n in (2, 3):
        kind = getattr(vision.misc, f"Conv{n}dNormActivation")
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[n]
        build = lambda k=kind, norm=norm: k(3, 4, norm_layer=lambda c: norm(c, **NORM))  # noqa: E731
        yield Case(f"vision.{kind.__name__}", build, (SIZES[n],))


def _name(kind: type, **options: Any) -> str:
    return "-".join([kind.__name__, *(f"{k}-{v}" for k, v in options.items())])
