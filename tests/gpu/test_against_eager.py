"""End to end on the GPU: models trained, evaluated and flipped under the backend, beside eager PyTorch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, Attention, ConvNet, Norms, Parent
from oracle import agrees
from setups import nets

KINDS = pytest.mark.parametrize("kind", ["eager", "bound-train", "bound-eval"])
NETS = [
    pytest.param(lambda: Parent(ConvNet()), IMAGE, id="parent"),
    *nets("conv", "norms", "unused", "activations", "regions", "attention"),
]
# Whose random numbers stock Inductor draws in another order than eager, fallback_random or not: all in torch 2.11, and
# wherever a kernel of attention draws its own. Stock Inductor is the oracle there.
STOCK_DRAWS: tuple[type[nn.Module], ...] = (Attention,) if torch.__version__ >= "2.12" else (nn.Module,)
DRAWING = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.MultiheadAttention)


def draws(model: nn.Module) -> bool:
    return any(isinstance(m, DRAWING) or "Drop" in type(m).__name__ for m in model.modules())


def make(model: nn.Module, kind: str, x: torch.Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    return model if kind == "eager" else cm.bind(torch.export.export(model.train(kind == "bound-train"), (x,)))


def check(
    reference: nn.Module,
    kind: str,
    x: torch.Tensor,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
    mode: str | None = None,
    **kwargs: Any,
) -> None:
    """Compares as ``agrees`` does, ``around`` both calls; each mode is compiled once."""
    module = make(reference, kind, x)
    as_stock = draws(reference) and isinstance(reference, STOCK_DRAWS)
    oracle = torch.compile(reference, mode=mode) if as_stock else reference
    compiled = torch.compile(module, backend="pt2e_modes", mode=mode)
    agrees(reference, module, around(compiled), [x], oracle=around(oracle), **kwargs)
    assert graphs_compiled() == (4 if as_stock else 2)


@KINDS
@pytest.mark.parametrize(("build", "x"), NETS)
def test_float32(build, x, kind, device):
    if build not in (ConvNet, Norms) and kind == "bound-eval":
        pytest.skip("from the train export only")  # in eval, attention has lost its p, and one dropout's input is used
    check(build().to(device), kind, x.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KINDS
def test_autocast(kind, dtype, device):
    reference = ConvNet().to(device)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.autocast(device, dtype):
                return call(*args)

        return run

    def level(module: nn.Module) -> None:  # the differences of rounding must not add up over the flips
        module.load_state_dict(copy.deepcopy(reference.state_dict()))

    with inductor_config.patch(emulate_precision_casts=True):
        check(reference, kind, IMAGE.to(device), around, steps=2, touch=level, tolerance=3e-2)


@KINDS
def test_channels_last(kind, device):
    reference = ConvNet().to(device, memory_format=torch.channels_last)
    x = IMAGE.to(device, memory_format=torch.channels_last)
    assert reference.block1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    check(reference, kind, x)


class Convolutions(nn.Module):
    """Batch norms and nothing random, so that eager is the oracle everywhere; its output shows the memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-2, momentum=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_goes_through(training, device):
    model = Convolutions().to(device, memory_format=torch.channels_last).train(training)
    x = IMAGE.to(device, memory_format=torch.channels_last)
    expected = copy.deepcopy(model)(x)
    assert torch.compile(model, backend="pt2e_modes")(x).stride() == expected.stride()


@pytest.mark.parametrize("enabled", [True, False], ids=["cudnn", "native"])
@KINDS
def test_cudnn_and_native_batch_norm(kind, enabled, device):
    with torch.backends.cudnn.flags(enabled=enabled, deterministic=True, allow_tf32=False):
        check(Convolutions().to(device), kind, IMAGE.to(device))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@KINDS
def test_modes_of_torch_compile(kind, mode, device):
    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return call(*args)

        return run

    check(Convolutions().to(device), kind, IMAGE.to(device), around, mode=mode)


@pytest.mark.parametrize(
    ("options", "equivalent"),
    [
        ({"training": False}, lambda m: m.eval()),
        ({"training": True}, lambda m: m.train()),
        ({"training": True, "overrides": {"bn1": "eval"}}, lambda m: m.train().bn1.eval()),
    ],
    ids=["eval", "train", "mixed"],
)
@pytest.mark.parametrize("flags", [True, False], ids=["flags-train", "flags-eval"])
def test_explicit_modes(options, equivalent, flags, device):
    reference = Convolutions().to(device)
    module = copy.deepcopy(reference).train(flags)
    equivalent(reference)
    compiled = torch.compile(module, backend="pt2e_modes", options=options)
    for _ in range(3):
        torch.testing.assert_close(compiled(IMAGE.to(device)), reference(IMAGE.to(device)), rtol=1e-4, atol=1e-4)
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


RANDOM = [nn.Dropout(0.3), nn.Dropout2d(0.4), nn.AlphaDropout(0.2), nn.RReLU()]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", ["eager", "bound-train"])
@pytest.mark.parametrize("layer", RANDOM, ids=[type(layer).__name__ for layer in RANDOM])
def test_random_layers_draw_as_stock_inductor_does(layer, kind, mode, device):
    stock, ours = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    x = torch.ones(64, 16, 2, 2, device=device) * torch.tensor([-1.0, 2.0], device=device)
    ours = make(ours, kind, x)
    calls = torch.compile(stock, mode=mode), torch.compile(ours, backend="pt2e_modes", mode=mode)
    masks = []
    with inductor_config.patch(fallback_random=False):
        for seed in (0, 0, 1, 2):
            found = []
            for call in calls:
                torch.compiler.cudagraph_mark_step_begin()
                leaf = x.clone().requires_grad_()
                torch.manual_seed(seed)
                output = call(leaf)
                output.sum().backward()
                assert leaf.grad is not None
                found.append((output.detach().clone(), leaf.grad.clone()))
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b), seed
            masks.append(found[1][0])
    assert torch.equal(masks[0], masks[1])  # the first call warms up, the second may record a CUDA graph
    assert not torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[2], masks[3])
    with inductor_config.patch(fallback_random=False):
        torch.testing.assert_close(calls[1].eval()(x), copy.deepcopy(stock).eval()(x))


def vision(name: str, **kwargs: Any) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def build() -> tuple[nn.Module, torch.Tensor]:
        torchvision = pytest.importorskip("torchvision")
        return torchvision.models.get_model(name, num_classes=10, **kwargs), torch.randn(4, 3, 64, 64)

    return build


def timm() -> tuple[nn.Module, torch.Tensor]:
    model = pytest.importorskip("timm").create_model("convnext_atto", num_classes=10, drop_path_rate=0.3, drop_rate=0.1)
    return model, torch.randn(4, 3, 64, 64)


def bert() -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.15, attention_probs_dropout_prob=0.2, return_dict=False,
    )  # fmt: skip
    return transformers.BertModel(config), torch.randint(5, 90, (2, 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [vision("resnet18"), vision("vit_b_16", image_size=64, dropout=0.1, attention_dropout=0.1), timm, bert],
    ids=["torchvision-resnet18", "torchvision-vit_b_16", "timm-convnext", "transformers-bert"],
)
def test_whole_models(build, device):
    """Stock Inductor is the oracle, for eager's order of random numbers is its own."""
    model, x = build()
    model, x = model.to(device), x.to(device)
    module = copy.deepcopy(model)
    compiled = torch.compile(module, backend="pt2e_modes")
    agrees(model, module, compiled, [x], oracle=torch.compile(model), flips=2, steps=2, tolerance=1e-3)
    for m in (model, module):
        m.load_state_dict(copy.deepcopy(model.state_dict()))
        m.eval()
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=1e-3, atol=1e-3)  # eval: eager itself
