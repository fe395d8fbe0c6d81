"""What the Triton kernels of each mode do, read in their sources and built to PTX, on machines without a GPU.

The oracle is the eager module on the CPU: which buffers a call changes, and whether it draws random numbers.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import compile_modes as cm
from nets import Activations, Attention, ConvNet, Norms, Parent, Regions, UnusedNorm
from triton_cuda.fake_cuda import compile_fake, fake, grad, stand_ins, triton_utils, unavailable
from triton_cuda.inductor_programs import Moved, Program, draws, parse, ptx

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")

IMAGE = (6, 3, 8, 8)
NORMS = ("block1.bn", "block2.bn")
STATISTICS = {f"{bn}.{name}" for bn in NORMS for name in ("running_mean", "running_var")}
COUNTERS = {f"{bn}.num_batches_tracked" for bn in NORMS}


def frozen_norms(model: nn.Module) -> None:
    model.train()
    for name in NORMS:
        model.get_submodule(name).eval()


def live_dropout(model: nn.Module) -> None:
    model.eval()
    model.get_submodule("block1.drop").train()


MODES: dict[str, Callable[[nn.Module], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "frozen norms": frozen_norms,
    "live dropout": live_dropout,
}
KINDS = ("eager", "bound train export", "bound eval export")


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    model, x = ConvNet(), torch.randn(IMAGE)
    if kind == "eager":
        return model, x
    return cm.bind(torch.export.export(model.train("train" in kind), (x,))), x


@functools.cache
def programs(kind: str, mode: str, *, backend: str = "pt2e_modes", options: str = "") -> tuple[Program, Program]:
    """Forward and backward of ConvNet; compiled once for all tests."""
    model, x = fake(lambda: make(kind))
    MODES[mode](model)
    forward, backward = compile_fake(model, [x], backend=backend, options=OPTIONS[options] if options else None)
    assert backward is not None
    return forward, backward


def effects(model: nn.Module, x: torch.Tensor) -> tuple[bool, set[str]]:
    """Whether an eager call draws random numbers, and which buffers it changes."""
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(x)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    return not torch.equal(before, torch.get_rng_state()), changed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.every(18)
def test_a_forward_draws_and_writes_what_eager_does(kind, mode):
    model, x = make("eager")
    MODES[mode](model)
    random, writes = effects(model, x)
    forward, backward = programs(kind, mode)
    assert (forward.draws, forward.writes) == (random, writes)
    assert not backward.draws
    assert not backward.writes
    assert random == (mode != "eval")
    assert writes == (STATISTICS | COUNTERS if mode == "train" else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_backward_uses_the_statistics_of_its_mode(kind):
    for mode, running in {"train": False, "eval": True, "frozen norms": True, "live dropout": True}.items():
        forward, backward = programs(kind, mode)
        assert backward.reads & STATISTICS == (STATISTICS if running else set()), mode
        for bn in NORMS:  # mean and 1/deviation, made by the kernel that updates the running ones
            made = forward.stored_beside(f"{bn}.running_mean")
            saved = {n for n, s in backward.saved.items() if s.source in made and s.shape == (1, 4, 1, 1)}
            assert len(saved & backward.reads) == (0 if running else 2), (mode, bn)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.every(3)
def test_a_backward_uses_the_masks_that_the_forward_drew(kind):
    for mode in MODES:
        forward, backward = programs(kind, mode)
        masks = {name for name, saved in backward.saved.items() if saved.dtype == torch.bool}
        assert bool(masks) == forward.draws, mode
        assert masks <= backward.reads


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_bound_model_has_the_kernels_of_the_eager_one(kind, mode):
    for ours, theirs in zip(programs(kind, mode), programs("eager", mode), strict=True):
        assert ours.text == theirs.text


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_kernels_are_those_of_stock_inductor(mode):
    for ours, stock in zip(programs("eager", mode), programs("eager", mode, backend="inductor"), strict=True):
        assert ours.kernels == stock.kernels


def test_no_two_modes_have_the_same_kernels():
    texts = [tuple(program.text for program in programs("eager", mode)) for mode in MODES]
    assert len(set(texts)) == len(MODES)


OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"training": True},
    "eval": {"training": False},
    "frozen norms": {"training": True, "overrides": {"*bn": "eval"}},
    "live dropout": {"training": False, "overrides": {"block1.drop": "train"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("asked", OPTIONS)
def test_options_give_the_kernels_that_flags_would_give(asked, kind, flags):
    forced, expected = programs(kind, flags, options=asked), programs(kind, asked)
    assert forced[1].text == expected[1].text
    if (flags, asked) != ("eval", "train"):
        assert forced[0].text == expected[0].text
        return
    # Dynamo's eval graph has no counter: the backend advances it beside the graph.
    assert forced[0].writes == STATISTICS
    assert forced[0].text == without_counters(expected[0]).text


def without_counters(program: Program) -> Program:
    calls = tuple(call for call in program.calls if not COUNTERS.intersection(call[1]))
    left = {name for name, _ in calls}
    return replace(program, calls=calls, kernels={n: source for n, source in program.kernels.items() if n in left})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.every(2)
def test_a_forced_counter_beside_the_graph_advances(kind):
    model, x = fake(lambda: make(kind))
    counters = [dict(model.named_buffers())[name] for name in COUNTERS]
    before = [counter._version for counter in counters]
    compile_fake(model.eval(), [x], backend="pt2e_modes", options={"training": True})
    assert [counter._version for counter in counters] == [version + 1 for version in before]


OTHERS = [
    pytest.param(Activations, (3, 4, 6), id="activations"),
    pytest.param(Norms, (3, 4, 5), id="norms"),
    pytest.param(Attention, (2, 5, 8), id="attention"),
    pytest.param(Regions, IMAGE, id="regions"),
    pytest.param(UnusedNorm, (3, 4), id="unused"),
    pytest.param(lambda: Parent(ConvNet()), IMAGE, id="parent"),
]


@functools.cache
def other_programs(build: Callable[[], nn.Module], shape: tuple[int, ...], training: bool) -> tuple[Program, ...]:
    model, x = fake(lambda: (build(), torch.randn(shape)))
    return tuple(p for p in compile_fake(model.train(training), [x], backend="pt2e_modes") if p is not None)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("build", "shape"), OTHERS)
def test_other_sites_draw_and_write_what_eager_does(build, shape, training):
    forward = other_programs(build, shape, training)[0]
    assert (forward.draws, set(forward.writes)) == effects(build().train(training), torch.randn(shape))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_autograd_there_is_no_backward_and_the_same_effects(training):
    model, x = fake(lambda: make("eager"))
    with torch.no_grad():
        forward, backward = compile_fake(model.train(training), [x], backend="pt2e_modes")
    assert backward is None
    assert forward.draws == training
    assert forward.writes == (STATISTICS | COUNTERS if training else set())


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """As ``torch.autocast("cuda", dtype)``, which turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_statistics_stay_float32(dtype):
    model, x = fake(lambda: make("eager"))
    with autocast(dtype):
        forward, backward = compile_fake(model.train(), [x], backend="pt2e_modes")
    assert backward is not None
    assert forward.writes == STATISTICS | COUNTERS
    assert any("*bf16" in k if dtype == torch.bfloat16 else "*fp16" in k for k in forward.kernels.values())
    saved = [s for s in backward.saved.values() if s.source in forward.stored_beside("block1.bn.running_mean")]
    assert {s.dtype for s in saved if s.shape == (1, 4, 1, 1)} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_builds_to_ptx(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sources = [program for mode in MODES for program in programs("eager", mode)]
    sources += [p for case in OTHERS for training in (True, False) for p in other_programs(*case.values, training)]
    kernels = {source: name for program in sources for name, source in program.kernels.items()}
    assert len(kernels) > 20
    with stand_ins():
        for source, name in kernels.items():
            built = ptx(name, source, tmp_path, capability)
            assert f".target sm_{capability}" in built
            assert f".entry {name}(" in built
            # Behind tl.rand is Philox: ten rounds of two wide products each.
            assert (built.count("mul.hi.u32") >= 10) == draws(source), name


class Many(nn.Module):
    """Broadcasts, casts, an output used twice, an unused input: what the engine of autograd does beside formulas."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, unused: torch.Tensor) -> list[torch.Tensor]:
        z = (x * y).relu()
        return [z + x.mean(0), (z.to(torch.float64) @ y.double()).sum(0, keepdim=True), z.unbind(0)[1]]


def test_the_stand_in_for_autograd_agrees_with_it():
    torch.manual_seed(0)
    for model, shapes in ((Many(), [(4, 3), (3,), (2,)]), (ConvNet(), [IMAGE])):
        inputs = [torch.randn(s, requires_grad=True) for s in shapes]
        outputs = model(*inputs)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        wanted, gradients = [*inputs, *model.parameters()], [torch.randn_like(o) for o in outputs]
        expected = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, retain_graph=True)
        for a, b in zip(grad(outputs, wanted, gradients, allow_unused=True), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_everything_is_put_back():
    interface = torch._dynamo.device_interface.CudaInterface
    watched = [(interface, n) for n in vars(interface)] + [(interface.Worker, n) for n in vars(interface.Worker)]
    watched += [(torch.cuda, n) for n in vars(torch.cuda)] + [(torch.autograd, "grad")]
    before = [inspect.getattr_static(owner, name) for owner, name in watched]
    with stand_ins():
        assert triton_utils.has_triton()
        assert torch.cuda.get_device_capability() == (8, 0)
    assert [inspect.getattr_static(owner, name) for owner, name in watched] == before
    assert triton_utils.has_triton() == torch.cuda.is_available()


def test_a_torch_that_has_moved_is_noticed(monkeypatch):
    with pytest.raises(Moved, match="not all kernels were read"):
        parse("f = async_compile.triton(\n'f', '''pass''')\n    def call(self, args):\n", {}, set())
    with pytest.raises(Moved, match="Inductor says"):
        parse("\ndef call(args):\n    return ()\n", {"primals_1": "bn.running_mean"}, {"primals_1"})
    monkeypatch.delattr(torch._dynamo.device_interface.CudaInterface, "is_bf16_supported")
    monkeypatch.delattr(torch._dynamo.device_interface.DeviceInterface, "is_bf16_supported", raising=False)
    with pytest.raises(Moved, match=r"CudaInterface\.is_bf16_supported does not exist"), stand_ins():
        pass
