"""Modules of public libraries that do something else by ``self.training``: right module by module, or refused by name.

Random weights and small sizes. A case of a library that is missing is skipped by name.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import compile_modes as cm
from compile_modes.graph.dual import DualModule

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A model, what to call it with, and what its export is to be.

    Attributes:
        name: what is tested.
        libraries: the modules that must be importable.
        build: makes the model, its arguments and its keyword arguments.
        dual: whether it takes two programs.
        deciders: of two programs, the submodules that warn when they are put into another mode than the root.
        refused: a pattern of the error or warning that export gives instead, if any.
        saved: whether it is compared behind ``save`` and ``load`` as well.
    """

    name: str
    libraries: tuple[str, ...]
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    dual: bool = False
    deciders: tuple[str, ...] = ()
    refused: str = ""
    saved: bool = False


CASES: list[Case] = []


def case(*libraries: str, **expected: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(build: Callable[[], Any]) -> Callable[[], Any]:
        CASES.append(Case(build.__name__, libraries, build, **expected))
        return build

    return add


class Around(nn.Module):
    """What is tested, behind an encoder with a site of its own; a head takes its first result."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
        self.inner, self.head = inner, nn.Linear(8, 3)

    def forward(self, x):
        found = self.inner(self.encoder(x))
        return self.head(found) if isinstance(found, torch.Tensor) else (self.head(found[0]), *found[1:])


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


# vector-quantize-pytorch


def quantizer(**kwargs: Any) -> nn.Module:
    """A VectorQuantize that doesn't ask a buffer whether k-means has run, which no export can answer."""
    from vector_quantize_pytorch import VectorQuantize

    made = VectorQuantize(dim=8, codebook_size=16, **kwargs)
    made._codebook.init_embed_ = lambda *_, **__: None
    return made


@case("vector_quantize_pytorch", saved=True)
def vq_ema():
    return Around(quantizer()), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch")
def vq_gumbel():
    return (
        Around(quantizer(stochastic_sample_codes=True, use_cosine_sim=True, rotation_trick=False)),
        (rows(4, 6, 8),),
        {},
    )


@case("vector_quantize_pytorch")
def vq_learnable():
    kwargs = {"learnable_codebook": True, "ema_update": False, "orthogonal_reg_weight": 10.0}
    return Around(quantizer(**kwargs)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch", refused="data-dependent")
def vq_dead_codes():
    return Around(quantizer(threshold_ema_dead_code=2)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch", refused="data-dependent")
def vq_as_it_is():
    from vector_quantize_pytorch import VectorQuantize

    return Around(VectorQuantize(dim=8, codebook_size=16, kmeans_init=False)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch")
def residual_vq():
    from vector_quantize_pytorch import ResidualVQ

    made = ResidualVQ(dim=8, codebook_size=16, num_quantizers=3)
    for layer in made.layers:
        layer._codebook.init_embed_ = lambda *_, **__: None
    return Around(made), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch", saved=True)
def lfq():
    from vector_quantize_pytorch import LFQ

    return Around(LFQ(dim=8, codebook_size=16, entropy_loss_weight=0.1)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch")
def fsq_with_noise():
    from vector_quantize_pytorch import FSQ

    return Around(FSQ(dim=8, levels=[5, 5, 3], noise_dropout=0.3, preserve_symmetry=True)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch")
def sim_vq():
    from vector_quantize_pytorch import SimVQ

    return Around(SimVQ(dim=8, codebook_size=16)), (rows(4, 6, 8),), {}


@case("vector_quantize_pytorch.binary_mapper")
def binary_mapper():
    from vector_quantize_pytorch.binary_mapper import BinaryMapper

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.mapper, self.head = nn.Linear(8, 4), BinaryMapper(bits=4), nn.Linear(16, 3)

        def forward(self, x):
            mapped, loss = self.mapper(self.fc(x))
            return self.head(mapped), loss

    return Mapped(), (rows(4, 6, 8),), {}


# Reinforcement learning and self-supervision


class Policy(nn.Module):
    """As in rsl_rl's actor: the statistics are updated by a method that is not ``forward``."""

    def __init__(self, until: int | None = None):
        super().__init__()
        from rsl_rl.modules.normalization import EmpiricalNormalization

        self.norm = EmpiricalNormalization(8, until=until)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 3))

    def forward(self, x):
        self.norm.update(x)
        return self.mlp(self.norm(x))


@case("rsl_rl.modules.normalization", saved=True)
def empirical_normalization():
    return Policy(), (rows(8, 8),), {}


@case("rsl_rl.modules.normalization", refused="data-dependent")
def empirical_normalization_until():
    return Policy(until=100), (rows(8, 8),), {}


@case("lightly.loss")
def dino_loss():
    """Assigns ``self.center.data``."""
    from lightly.loss import DINOLoss

    class Dino(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8))
            self.teacher = nn.Linear(8, 8).requires_grad_(False)
            self.loss = DINOLoss(8, 0.04, 0.04, 1)

        def forward(self, a, b):
            if not self.training:
                return self.teacher(a)
            with torch.no_grad():
                targets = [self.teacher(a), self.teacher(b)]
            return self.loss(targets, [self.student(a), self.student(b)])

    return Dino(), (rows(8, 8), rows(8, 8)), {}


@case("lightly.models.modules.center")
def dino_center():
    from lightly.models.modules.center import Center

    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.center = nn.Linear(8, 8), Center((1, 8))

        def forward(self, x):
            h = self.fc(x)
            out = (h - self.center.value).softmax(-1)
            if self.training:
                self.center.update(h.detach())
            return out

    return Centered(), (rows(8, 8),), {}


class MoCo(nn.Module):
    """A momentum encoder and a queue, written at a place that is a tensor."""

    def __init__(self, update: Callable[[nn.Module, nn.Module], None]):
        super().__init__()
        self.update = update
        self.q = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.k = copy.deepcopy(self.q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 32), dim=0))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, a, b):
        q = F.normalize(self.q(a), dim=1)
        with torch.no_grad():
            if self.training:
                self.update(self.q, self.k)
            k = F.normalize(self.k(b), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().detach()], 1) / 0.07
        if self.training:
            self.queue.index_copy_(1, (self.place + torch.arange(len(k))) % self.queue.shape[1], k.T)
            self.place.add_(len(k)).remainder_(self.queue.shape[1])
        return logits


@case(saved=True)
def moco_in_place():
    def update(q, k):
        for a, b in zip(q.parameters(), k.parameters(), strict=True):
            b.mul_(0.9).add_(a, alpha=0.1)

    return MoCo(update), (rows(8, 8), rows(8, 8)), {}


@case("lightly.models.utils")
def moco_of_lightly():
    from lightly.models.utils import update_momentum

    return MoCo(lambda q, k: update_momentum(q, k, 0.9)), (rows(8, 8), rows(8, 8)), {}


@case()
def moco_of_the_paper():
    """As in facebookresearch/moco, which assigns ``param_k.data``."""

    @torch.no_grad()
    def update(q, k):
        for a, b in zip(q.parameters(), k.parameters(), strict=True):
            b.data = b.data * 0.9 + a.data * 0.1

    return MoCo(update), (rows(8, 8), rows(8, 8)), {}


@case("lightly.loss", refused="data-dependent")
def memory_bank():
    """Slices the queue at ``int(self.bank_ptr)``."""
    from lightly.loss import NTXentLoss

    class Contrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.loss = nn.Linear(8, 8), NTXentLoss(memory_bank_size=(32, 8))

        def forward(self, a, b):
            return self.loss(self.net(a), self.net(b))

    return Contrast(), (rows(8, 8), rows(8, 8)), {}


@case("lightly.loss.wmse_loss", saved=True)
def whitening():
    from lightly.loss.wmse_loss import Whitening2d

    return Around(Whitening2d(8)), (rows(32, 8),), {}


@case("lightly.models.batchnorm", refused="CM302")
def split_batch_norm_that_train_changes():
    from lightly.models.batchnorm import SplitBatchNorm

    return nn.Sequential(nn.Conv2d(3, 4, 3), SplitBatchNorm(4, 2)), (rows(4, 3, 8, 8),), {}


# transformers

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"num_key_value_heads": 1, "num_local_experts": 4, "router_jitter_noise": 0.1, "use_cache": False}


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 60, (2, 7))}


@case("transformers")
def mixtral_jitter():
    """With attention of plain ops: transformers gives SDPA a mask when it is exported, and none in eager."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=64, max_position_embeddings=32, attention_dropout=0.1, **TINY, **EXPERTS)
    config._attn_implementation = "eager"
    return MixtralForCausalLM(config), (), tokens()


@case("transformers", refused="(?i)autograd.*function")
def phimoe_jitter():
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(vocab_size=64, max_position_embeddings=32, input_jitter_noise=0.1, **TINY, **EXPERTS)
    return PhimoeForCausalLM(config), (), tokens()


def wav2vec2(**kwargs: Any):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2}
    config = Wav2Vec2Config(**{**TINY, **layers, **position, "layerdrop": 0.0, "mask_time_prob": 0.0, **kwargs})
    return Wav2Vec2Model(config), (rows(2, 400),), {}


@case("transformers")
def wav2vec2_dropouts():
    return wav2vec2()


@case("transformers", refused="data-dependent")
def wav2vec2_layerdrop():
    return wav2vec2(layerdrop=0.3)


@case("transformers", refused="(?i)numpy")
def wav2vec2_spec_augment():
    """NumPy draws the mask, once and for all if it is exported."""
    return wav2vec2(mask_time_prob=0.3)


@case("transformers", refused="data-dependent")
def bart_layerdrop():
    from transformers import BartConfig, BartModel

    sides = ("encoder", "decoder")
    sizes = {
        f"{side}_{key}": n for side in sides for key, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = BartConfig(
        vocab_size=64, d_model=16, max_position_embeddings=32, encoder_layerdrop=0.3, use_cache=False, **sizes
    )
    return BartModel(config), (), tokens()


# x-transformers


@case("x_transformers", refused=r"(?i)\brandom\b")
def layer_dropout():
    """Python's ``random`` draws which layers run, once and for all if it is exported."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, layer_dropout=0.5)
    return TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers), (torch.randint(0, 64, (2, 7)),), {}


@case("x_transformers")
def context_tokens_dropout():
    """In train, fewer tokens of the context."""
    from x_transformers import CrossAttender

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = CrossAttender(dim=16, depth=1, heads=2, attn_dim_head=8, cross_attn_tokens_dropout=0.3)

        def forward(self, x, context):
            return self.inner(x, context=context)

    return Attends(), (rows(2, 5, 16), rows(2, 6, 16)), {}


# timm and torchvision

VIT = {"embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}


@case("timm", dual=True, deciders=("patch_drop",))
def vit_patch_drop():
    """Between the module that decides and the blocks, whose sizes follow, is another one."""
    import timm

    kwargs = {"patch_drop_rate": 0.25, "drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    return (
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, **VIT, **kwargs),
        (rows(2, 3, 32, 32),),
        {},
    )


@case("timm", dual=True, deciders=("patch_drop",))
def eva_patch_drop():
    """The indices of the patches come back to the root, which takes their position embeddings."""
    import timm

    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, patch_size=7, patch_drop_rate=0.25, **VIT)
    return model, (rows(2, 3, 28, 28),), {}


@case("timm", dual=True)
def deit_distilled():
    """Two outputs in train, their mean in eval."""
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, **VIT)
    model.set_distilled_training(True)
    return model, (rows(2, 3, 32, 32),), {}


@case("timm")
def resnet18_drop_block():
    import timm

    model = timm.create_model("resnet18", num_classes=5, drop_block_rate=0.1, drop_path_rate=0.2, drop_rate=0.1)
    return model, (rows(2, 3, 64, 64),), {}


@case("timm")
def efficientnet_b0_drop_path():
    import timm

    return timm.create_model("efficientnet_b0", num_classes=5, drop_path_rate=0.2), (rows(2, 3, 32, 32),), {}


@case("timm.layers")
def evonorm():
    from timm.layers import EvoNorm2dB0

    return (
        nn.Sequential(nn.Conv2d(3, 8, 3), EvoNorm2dB0(8), nn.Conv2d(8, 8, 3), EvoNorm2dB0(8)),
        (rows(4, 3, 9, 9),),
        {},
    )


@case("timm.layers.split_batchnorm", saved=True)
def split_batch_norm():
    """In train, other statistics for the second half of the batch."""
    from timm.layers.split_batchnorm import SplitBatchNorm2d as Split

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Split(8, num_splits=2), nn.ReLU(), Split(8, num_splits=2))
    return model, (rows(4, 3, 9, 9),), {}


@case("torchvision.models.swin_transformer")
def swin_stochastic_depth():
    from torchvision.models import SwinTransformer

    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4]}
    model = SwinTransformer(**sizes, stochastic_depth_prob=0.3, dropout=0.1, attention_dropout=0.1, num_classes=5)
    return model, (rows(2, 3, 32, 32),), {}


class Head(nn.Module):
    """Losses in train, boxes in eval, as the detection models of torchvision return them."""

    def __init__(self, named: bool):
        super().__init__()
        self.named, self.scores, self.boxes = named, nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, h, labels, boxes):
        scores, found = self.scores(h), self.boxes(h)
        if self.training:
            values = {"classification": F.cross_entropy(scores, labels), "box": F.l1_loss(found, boxes)}
        else:
            values = {"boxes": found.exp(), "scores": scores.softmax(1).amax(1)}
        return values if self.named else tuple(values.values())


class Detector(nn.Module):
    def __init__(self, named: bool):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        self.head = Head(named)

    def forward(self, x, labels, boxes):
        return self.head(self.backbone(x), labels, boxes)


def detections() -> tuple[torch.Tensor, ...]:
    return rows(2, 3, 17, 17), torch.randint(0, 3, (2, 8, 8)), torch.rand(2, 4, 8, 8)


@case(dual=True, deciders=("head",), saved=True)
def detector_of_dicts():
    return Detector(True), detections(), {}


@case(saved=True)
def detector_of_pairs():
    return Detector(False), detections(), {}


# nflows, TabNet, PyG, BYOL


@case("nflows.transforms", saved=True)
def flow():
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, BatchNorm, CompositeTransform

    def net(features, out):
        return ResidualNet(features, out, 8, num_blocks=1, dropout_probability=0.1, use_batch_norm=True)

    masks = torch.tensor([[1, -1] * 4, [-1, 1] * 4])
    steps = [step for mask in masks for step in (AffineCouplingTransform(mask, net), BatchNorm(8))]
    return CompositeTransform(steps), (rows(8, 8),), {}


@case("nflows.transforms", refused="data-dependent")
def flow_act_norm():
    """Its first call in train sets its parameters."""
    from nflows.transforms import ActNorm

    return Around(ActNorm(8)), (rows(8, 8),), {}


@case("pytorch_tabnet.tab_network", refused="(?i)autograd.*function")
def tabnet():
    """Its sparsemax is an autograd.Function, whose backward torch.export drops."""
    from pytorch_tabnet.tab_network import TabNetNoEmbeddings

    sizes = {"n_d": 4, "n_a": 4, "n_steps": 2, "virtual_batch_size": 4}
    return TabNetNoEmbeddings(8, 3, **sizes, group_attention_matrix=torch.eye(8)), (rows(8, 8),), {}


@case("torch_geometric.nn", saved=True)
def hetero_batch_norm():
    from torch_geometric.nn import HeteroBatchNorm

    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), HeteroBatchNorm(8, 3)

        def forward(self, x, kinds):
            return self.norm(self.fc(x), kinds)

    return Typed(), (rows(12, 8), torch.arange(12) % 3), {}


@case("torch_geometric.nn")
def dropped_edges():
    from torch_geometric.nn import GCNConv
    from torch_geometric.utils import dropout_edge

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = GCNConv(8, 8)

        def forward(self, x, edges):
            return self.conv(x, dropout_edge(edges, 0.3, training=self.training)[0])

    return Graph(), (rows(6, 8), torch.randint(0, 6, (2, 10))), {}


@case("torch_geometric.nn", refused="carries gradients")
def graph_instance_norm():
    """Its running statistics carry gradients from one call into the next."""
    from torch_geometric.nn import InstanceNorm

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), InstanceNorm(8, track_running_stats=True)

        def forward(self, x, batch):
            return self.norm(self.fc(x), batch, 3)

    return Graph(), (rows(12, 8), torch.arange(12) // 4), {}


@case("byol_pytorch")
def byol():
    from byol_pytorch import BYOL

    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
    sizes = {"image_size": 16, "hidden_layer": -1, "projection_size": 8, "projection_hidden_size": 16}
    same = {"augment_fn": nn.Identity(), "augment_fn2": nn.Identity(), "sync_batchnorm": False}
    return BYOL(nn.Sequential(*layers), **sizes, **same), (rows(4, 3, 16, 16),), {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_module_follows_its_own_mode(case, tmp_path):
    for library in case.libraries:
        pytest.importorskip(library)
    torch.manual_seed(0)
    model, args, kwargs = case.build()
    if case.refused:
        with pytest.raises((cm.ExportError, cm.ModeWarning), match=case.refused):  # in tests, warnings are errors
            cm.export(model, args, kwargs)
        return
    module = cm.export(model, args, kwargs)
    assert isinstance(module, DualModule) is case.dual
    equal_in_modes(module, model, case, args, kwargs)
    if case.saved:
        cm.save(module, tmp_path / "module.pt2")
        equal_in_modes(cm.load(tmp_path / "module.pt2"), model, case, args, kwargs)
    for decider in case.deciders:
        with pytest.warns(cm.ModeWarning, match="CM307"):
            module.train().get_submodule(decider).eval()


def equal_in_modes(module, model, case, args, kwargs):
    """Equal in train, eval and random modes; of two programs, but for those of which a warning has said so."""
    report = cm.verify(module, model, *args, kwargs=kwargs, vectors=10)
    assert report.vectors + len(report.left_out) >= min(10, 2 ** len(list(model.modules())) // 2)  # few have few
    assert all("CM307" in why for why in report.left_out) if case.deciders else not report.left_out
    gone = {name for name, _ in model.named_modules()} - {name for name, _ in module.named_modules()}
    for mode in (True, False):  # no flag of theirs is left to be flipped
        expected, flipped = (called(model, mode, but, args, kwargs) for but in (set(), gone))
        assert all(map(torch.equal, expected, flipped)), gone


def called(model, mode, but, args, kwargs):
    """The tensors that a copy of the model returns, with all modules in one mode but for some."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        module.training = mode is not (name in but)
    torch.manual_seed(0)
    return [value.detach() for value in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(value, torch.Tensor)]
