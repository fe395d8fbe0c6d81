"""Whole models of torchvision, timm and transformers: random weights, small inputs, all dropouts switched on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A model and what to call it with.

    Attributes:
        name: as the library calls it.
        library: what must be installed.
        build: makes the model.
        inputs: makes the inputs; by name, as keyword arguments, where the model has many.
        dual: whether Python makes the two modes different programs.
        bind: whether one train export is enough to bind it exactly.
        tolerance: largest difference from eager; 0.0 means bit for bit.
        lr: learning rate of the comparison.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    dual: bool = False
    bind: bool = True
    tolerance: float = 0.0
    lr: float = 0.01


def vision(name: str, size: int = 64, batch: int = 4, **kwargs: Any) -> Case:
    """A model of torchvision."""
    split = {key: kwargs.pop(key) for key in ("dual", "bind", "tolerance", "lr") if key in kwargs}

    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, num_classes=10, **kwargs)

    return Case(name, "torchvision", build, lambda: {"x": torch.randn(batch, 3, size, size)}, **split)


def timm(name: str, size: int = 64, batch: int = 4, **kwargs: Any) -> Case:
    """A model of timm."""
    split = {key: kwargs.pop(key) for key in ("dual", "bind", "tolerance", "lr") if key in kwargs}

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **kwargs)

    return Case(name, "timm", build, lambda: {"x": torch.randn(batch, 3, size, size)}, **split)


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DROPOUT = {"hidden_dropout_prob": 0.15, "attention_probs_dropout_prob": 0.2}


def hugging(name: str, model: str, config: dict[str, Any], inputs: Callable[[], dict[str, torch.Tensor]]) -> Case:
    """A model of transformers, with a tiny random configuration."""

    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, model)
        return cls(cls.config_class(**config))

    return Case(name, "transformers", build, inputs)


def tokens(*names: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.randint(5, 90, (2, 9)) for name in names}


CASES = [
    vision("resnet18"),
    vision("mobilenet_v3_small"),
    vision("efficientnet_b0"),
    vision("densenet121", drop_rate=0.1),
    vision("inception_v3", size=299, batch=3, aux_logits=True, init_weights=False, dual=True),
    vision("googlenet", aux_logits=True, init_weights=False, dual=True),
    vision("swin_t", attention_dropout=0.1, dropout=0.1),
    vision("vit_b_16", image_size=64, attention_dropout=0.1, dropout=0.1, batch=2),
    vision("convnext_tiny", stochastic_depth_prob=0.3),
    timm("convnext_tiny", drop_path_rate=0.3, drop_rate=0.1),
    timm("resnet26d", drop_path_rate=0.2, drop_rate=0.1),
    timm(
        "vit_tiny_patch16_224",
        img_size=64,
        drop_rate=0.1,
        pos_drop_rate=0.1,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
    ),
    timm("levit_128s", size=224, batch=4, drop_path_rate=0.2),
    hugging("bert", "BertModel", {"vocab_size": 100, **TINY, **DROPOUT}, tokens("input_ids")),
    hugging(
        "gpt2",
        "GPT2LMHeadModel",
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False},
        tokens("input_ids"),
    ),
    hugging(
        "vit",
        "ViTModel",
        {"image_size": 32, "patch_size": 8, **TINY, **DROPOUT},
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    hugging(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "dropout_rate": 0.1, "use_cache": False, "decoder_start_token_id": 0,
        },
        tokens("input_ids", "decoder_input_ids"),
    ),
    hugging(
        "llama",
        "LlamaForCausalLM",
        {"vocab_size": 100, **TINY, "attention_dropout": 0.1, "max_position_embeddings": 32, "use_cache": False},
        tokens("input_ids"),
    ),
]  # fmt: skip


def prepared(case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model with parameters moved off their special values and statistics of its own, and one batch.

    Zero-initialised heads, unit scales and fresh statistics let wrong programs pass by accident.
    """
    torch.manual_seed(1)
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.train()
        for _ in range(3):
            model(**inputs)
    return model, inputs
