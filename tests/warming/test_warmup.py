"""``warmup``: nothing is left to compile, and nothing has changed."""

import copy
import json
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, ConvNet
from oracle import same_state
from setups import compiled_as


class Stateful(nn.Module):
    """Writes a buffer, replaces another, lets a third grow, writes its input, draws numbers of all generators."""

    def __init__(self):
        super().__init__()
        self.net = ConvNet()
        self.unused = nn.Parameter(torch.ones(2))
        for name in ("written", "replaced", "grown"):
            self.register_buffer(name, torch.zeros(1))
        self.register_buffer("frozen", torch.full((1,), torch.nan))

    def forward(self, x, extra):
        self.written += 1
        self.replaced = self.replaced + 1
        extra["scale"].mul_(2)
        extra["list"].append(1)
        self.outside()
        return self.net(x * extra["scale"]), {"other": x.sum()}

    @torch.compiler.disable
    def outside(self):
        self.grown.resize_(3).fill_(1)
        with torch.no_grad():
            self.unused.add_(random.random() + numpy.random.rand())


def state(module):
    """Everything that must not change: identities, and copies of values."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    grads = {name: p.grad for name, p in module.named_parameters()}
    return (
        [(name, id(t), t.requires_grad, name == "grown" or t.data_ptr()) for name, t in tensors.items()],
        [t.detach().clone() for t in tensors.values()],
        [(name, id(g)) for name, g in grads.items()],
        [g.clone() for g in grads.values() if g is not None],
        [m.training for m in module.modules()],
        [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.tensor(numpy.random.get_state()[1].tolist())],
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
    )


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        if a and isinstance(a[0], torch.Tensor):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def train_and_evaluate(call, steps=2):
    optimizer = torch.optim.SGD(call.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)
        call.train()
        optimizer.zero_grad()
        outputs.append(call(IMAGE))
        outputs[-1].square().sum().backward()
        optimizer.step()
        call.eval()
        with torch.no_grad():
            outputs.append(call(IMAGE))
    return [o.detach() for o in outputs]


@pytest.mark.parametrize("kind", ["wrapped", "in place", "forward", "nested", "bound"])
@pytest.mark.every(6)
def test_training_compiles_nothing_more_and_is_the_same(kind, compiled):
    torch.manual_seed(1)
    cold = compiled_as(kind, ConvNet(), IMAGE)
    torch.manual_seed(1)
    warm = compiled_as(kind, ConvNet(), IMAGE)
    expected = (torch.manual_seed(2), train_and_evaluate(cold))[1]
    torch._dynamo.reset()
    compiled.forward = compiled.backward = 0
    torch.manual_seed(2)
    assert cm.warmup(warm, IMAGE, progress=False) == 2
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    assert before[1:] == (2, 1)
    found = train_and_evaluate(warm)
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    same_state(cold, warm, 0.0)
    assert cm.warmup(warm, IMAGE, progress=False) == 0


@torch.compiler.disable
def fail_in_train(module, inputs, output):
    if module.training:
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.every(2)
def test_everything_is_as_before(fails, no_inductor):
    model = Stateful()
    model.net.block1.eval()
    model.net.block2.bn.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.net.fc(torch.ones(4)).sum().backward()
    optimizer.step()  # some parameters have a gradient and optimizer state, others have none
    model.net.fc.weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    scale, x = torch.ones(1), IMAGE.clone().requires_grad_()
    extra = {"scale": scale, "list": []}
    moments = copy.deepcopy(optimizer.state_dict())
    compiled = torch.compile(model, backend="pt2e_modes")
    before = state(model)
    if fails:
        hook = model.net.drop.register_forward_hook(fail_in_train)
        with pytest.raises(cm.WarmupError, match="mode 'train'") as error:
            cm.warmup(compiled, x, extra, modes=("eval", "train"), progress=False)
        assert "out of luck" in str(error.value.__cause__)
        hook.remove()
    else:
        cm.warmup(compiled, x, kwargs={"extra": extra}, modes=("eval", "train", {"*": "eval"}), progress=False)
    assert_same(before, state(model))
    assert x.grad is None
    assert torch.equal(x, IMAGE)
    assert extra["scale"] is scale
    assert scale == 1
    assert extra["list"] == []
    assert repr(moments) == repr(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "touch", "grad"),
    [
        ({"modes": "train", "grad": [False, True]}, lambda m: m.train(), [False, True]),
        ({"modes": "eval", "grad": {"eval": [True, False, "inference"]}}, lambda m: m.eval(), [True, False, None]),
        ({"modes": ["current"]}, lambda m: m.block2.eval(), [True]),
        ({"modes": {"block1.*": "eval", "*": "train"}}, lambda m: [c.eval() for c in m.block1.children()], [True]),
        ({"modes": [{"": "eval"}], "grad": {"train": True}}, lambda m: setattr(m, "training", False), [False]),
    ],
    ids=["train", "eval", "current", "globs", "root"],
)
def test_modes_and_grad_modes(options, touch, grad, compiled):
    model = ConvNet()
    call = torch.compile(model, backend="pt2e_modes")
    if options["modes"] == ["current"]:
        touch(model)
    assert cm.warmup(call, IMAGE, progress=False, **options) == len(grad)
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    touch(model)
    for mode in grad:
        with torch.inference_mode(mode is None), torch.set_grad_enabled(mode is True):
            output = call(IMAGE)
        if mode:
            output.sum().backward()
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before


def test_a_train_method_of_the_users_own_is_called(no_inductor):
    class KeepsStatistics(ConvNet):
        def train(self, mode=True):
            super().train(mode)
            self.block1.bn.training = False
            return self

    call = torch.compile(KeepsStatistics(), backend="pt2e_modes")
    assert cm.warmup(call, IMAGE, progress=False) == 2
    before = graphs_compiled()
    train_and_evaluate(call)
    assert graphs_compiled() == before


def test_the_callers_graph_stays_usable_and_views_stay_views(compiled):
    model = ConvNet()
    call = torch.compile(model, backend="pt2e_modes", dynamic=True)
    leaf = torch.randn(12, 3, 8, 8, requires_grad=True)
    x = leaf.exp()  # keeps its result for backward
    batch = x[:6]
    cm.warmup(call, batch, progress=False)
    before = (graphs_compiled(), compiled.backward)
    call(batch).sum().backward()
    assert (graphs_compiled(), compiled.backward) == before
    assert leaf.grad.abs().sum() > 0


@pytest.mark.slow
def test_dataclasses_are_looked_into(compiled):
    import dataclasses

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        name: str = "logits"

    class Model(ConvNet):
        def forward(self, x):
            return Output(super().forward(x))

    cm.warmup(torch.compile(Model(), backend="pt2e_modes"), IMAGE, modes="train", progress=False)
    assert compiled.backward == 1


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "compiled ddp", "fully_shard"])
@pytest.mark.every(4)
def test_distributed_wrappers(kind, compiled, one_process):
    from torch.distributed.fsdp import fully_shard

    reference = ConvNet()
    model = copy.deepcopy(reference)
    if kind == "fully_shard":
        for part in (model.block1, model.block2, model):
            fully_shard(part)
    if kind == "ddp":
        call = DistributedDataParallel(torch.compile(model, backend="pt2e_modes"))
    else:
        call = torch.compile(model if kind == "fully_shard" else DistributedDataParallel(model), backend="pt2e_modes")
    cm.warmup(call, IMAGE, progress=False)
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    assert all(p.grad is None for p in call.parameters())
    for x, y in zip(train_and_evaluate(reference, 1), train_and_evaluate(call, 1), strict=True):
        torch.testing.assert_close(y, x)
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before


def test_inference_tensors(no_inductor):
    with torch.inference_mode():
        model = ConvNet().eval()
        x = IMAGE.clone()
    call = torch.compile(model, backend="pt2e_modes")
    before = state(model)
    assert cm.warmup(call, x, modes=["eval", "train"], grad="inference", progress=False) == 2
    assert_same(before, state(model))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pt2e_modes", "inductor"])
def test_inductor_has_nothing_left_to_compile(backend):
    torch.manual_seed(1)
    cold = ConvNet()
    warm = copy.deepcopy(cold)
    torch.manual_seed(2)
    expected = train_and_evaluate(torch.compile(cold, backend=backend))
    torch._dynamo.reset()
    torch.manual_seed(2)
    call = torch.compile(warm, backend=backend)
    cm.warmup(call, IMAGE, progress=False)
    before = (graphs_compiled(), copy.deepcopy(counters["inductor"]), copy.deepcopy(counters["aot_autograd"]))
    found = train_and_evaluate(call)
    assert (graphs_compiled(), counters["inductor"], counters["aot_autograd"]) == before
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    same_state(cold, warm, 0.0)


SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
import compile_modes as cm
from nets import IMAGE, ConvNet
torch.manual_seed(0)
call = torch.compile(ConvNet(), backend="pt2e_modes")
graphs = cm.warmup(call, IMAGE, progress=False)
call.train()(IMAGE).sum().backward()
print(json.dumps([graphs, counters["inductor"], counters["aot_autograd"]]))
"""


@pytest.mark.slow
def test_a_second_process_takes_both_modes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    runs = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (graphs, first, first_aot), (graphs_again, second, second_aot) = runs
    assert graphs == graphs_again == 2
    assert (first["fxgraph_cache_miss"], first_aot["autograd_cache_miss"]) == (3, 2)
    assert second_aot["autograd_cache_hit"] == 2
    assert "fxgraph_cache_miss" not in second
    assert "autograd_cache_miss" not in second_aot
