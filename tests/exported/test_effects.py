"""What a call may do is what its bodies do, at any depth: nothing that writes may pass for nothing."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import compile_modes as cm
from compile_modes.graph.effects import has_effect
from graphs import bodies
from oracle import agrees

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


class Book(nn.Module):
    """A buffer that only training updates, and that nothing reads in the same call."""

    def __init__(self, surroundings, mode=True):
        super().__init__()
        self.surroundings, self.mode = surroundings, mode
        self.register_buffer("book", torch.ones(4))
        self.fc = nn.Linear(4, 4)

    @torch.no_grad()
    def decorated(self, h):
        self.book.mul_(0.9).add_(h.mean(0), alpha=0.1)

    def forward(self, x):
        h = self.fc(x)
        if self.training is self.mode:
            if self.surroundings == "no_grad":
                with torch.no_grad():
                    self.book.mul_(0.9)
            elif self.surroundings == "decorated":
                self.decorated(h.detach())
            elif self.surroundings == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    self.book.mul_(0.9)
            elif self.surroundings == "nested":
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    self.book.mul_(0.9)
            elif self.surroundings == "inference":
                with torch.inference_mode():
                    self.book.mul_(0.9)
            elif self.surroundings == "checkpoint":
                torch.utils.checkpoint.checkpoint(lambda _: self.book.mul_(0.9), h.detach(), use_reentrant=False)
            else:
                with torch.no_grad():
                    torch.rand(4)
        return h


SURROUNDINGS = ("no_grad", "decorated", "autocast", "nested", "inference", "checkpoint", "draw")


@pytest.mark.parametrize("mode", [True, False], ids=["in-train", "in-eval"])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.every(6)
def test_a_write_that_nobody_reads_happens_in_its_mode_only(surroundings, mode):
    reference, model = (nn.Sequential(Book(surroundings, mode), nn.Dropout(0.2)) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    agrees(reference, cm.export(model, (X,)), inputs=[X], tolerance=0.0)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("b", torch.ones(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        with torch.no_grad():
            self.function(self, x)
        return x + 1


@pytest.mark.parametrize(
    ("function", "training", "expected"),
    [
        (lambda m, x: m.b.mul_(2), True, True),
        (lambda m, x: x * 2, True, False),
        (lambda m, x: torch.rand_like(x), True, True),
        (lambda m, x: nn.functional.dropout(x, 0.5, m.training), True, True),
        (lambda m, x: m.norm(x), True, True),
        (lambda m, x: m.norm(x), False, False),
    ],
    ids=["write", "compute", "draw", "dropout", "norm-train", "norm-eval"],
)
def test_a_call_does_what_its_body_does(function, training, expected):
    graph = torch.export.export(Call(function).train(training), (X,)).module()
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.wrap_with_set_grad_enabled]
    assert [has_effect(graph, call) for call in calls] == [expected]
    others = [n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert not any(has_effect(graph, n) for n in others)
    assert len(bodies(graph)) == 2
