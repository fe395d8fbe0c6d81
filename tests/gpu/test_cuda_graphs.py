"""``mode="reduce-overhead"``: each mode has CUDA graphs of its own, which are recorded once and replayed ever after."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

import compile_modes as cm
from nets import IMAGE, ConvNet

WATCHED = ("record_function", "execute_node", "run_eager")


@dataclass
class Watch:
    """How often CUDA graphs were recorded, replayed, or not used, since the last :meth:`take`."""

    seen: Counter[str] = field(default_factory=Counter)

    def take(self) -> Counter[str]:
        taken = Counter({name: self.seen[name] for name in WATCHED})
        for name in ("cudagraph_skips", "cudagraph_recorded_non_static_inputs"):
            taken[name] = counters["inductor"].pop(name, 0)
        self.seen.clear()
        return taken


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    result = Watch()

    def counted(name: str) -> Any:
        original = getattr(CUDAGraphTreeManager, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result.seen[name] += 1
            return original(self, *args, **kwargs)

        return method

    for name in WATCHED:
        monkeypatch.setattr(CUDAGraphTreeManager, name, counted(name))
    return result


def test_what_is_watched_exists(watch):
    """Runs everywhere: a torch that has moved would otherwise show on a GPU only."""
    assert set(watch.take()) == {*WATCHED, "cudagraph_skips", "cudagraph_recorded_non_static_inputs"}
    assert not sum(watch.take().values())


def step(call: Any, model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer, grad_in_eval: bool) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    if model.training:
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    else:
        with torch.set_grad_enabled(grad_in_eval):
            call(x)


def protocol(model: nn.Module, backend: str, x: torch.Tensor, watch: Watch, grad_in_eval: bool) -> list[Counter[str]]:
    """What is counted in a first phase of flips, and in every mode after that."""
    torch._dynamo.reset()
    watch.take()
    call = torch.compile(model, backend=backend, mode="reduce-overhead")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    phases = []
    with inductor_config.patch(fallback_random=False):
        for flip in range(10):
            model.train(flip % 2 == 0)
            for _ in range(4):
                step(call, model, x, optimizer, grad_in_eval)
            if flip >= 3:
                phases.append(watch.take())
    return phases


@pytest.mark.parametrize("grad_in_eval", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ["eager", "bound"])
def test_flips_record_nothing_and_replay_as_stock_does(kind, grad_in_eval, gpu, watch):
    stock, x = ConvNet().to(gpu), IMAGE.to(gpu)
    ours = copy.deepcopy(stock)
    if kind == "bound":
        ours = cm.bind(torch.export.export(ours, (x,)))
    theirs = protocol(stock, "inductor", x, watch, grad_in_eval)
    found = protocol(ours, "pt2e_modes", x, watch, grad_in_eval)
    assert found[0]["record_function"] > 0
    assert found[0]["cudagraph_skips"] == 0
    # Parameters and buffers are static: not copied into the graphs, so that only x is left of what comes from outside.
    assert found[0] == theirs[0]
    for number, (phase, expected) in enumerate(zip(found[1:], theirs[1:], strict=True)):
        training = number % 2 == 0
        assert phase["record_function"] == phase["run_eager"] == phase["cudagraph_skips"] == 0, number
        assert phase["execute_node"] >= (8 if training else 4), number  # forward and backward, or forward
        assert phase == expected, number


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_the_input_is_copied_into_a_forward_graph(training, gpu, watch):
    model, x = ConvNet().to(gpu).train(training), IMAGE.to(gpu)
    call = torch.compile(model, backend="pt2e_modes", mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            call(x.clone())
    counted = watch.take()
    assert counted["record_function"] == 1
    assert counted["cudagraph_recorded_non_static_inputs"] == 1
    assert counted["cudagraph_skips"] == 0


def test_replayed_graphs_see_new_weights_and_write_statistics(gpu):
    reference, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)).to(gpu), IMAGE.to(gpu)
    module = copy.deepcopy(reference)
    call = torch.compile(module, backend="pt2e_modes", mode="reduce-overhead")
    for flip in range(8):
        for model in (reference, module):
            model.train(flip % 2 == 0)
            with torch.no_grad():
                model[0].weight.mul_(1.1)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                torch.testing.assert_close(call(x), reference(x), rtol=1e-4, atol=1e-4)
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)
