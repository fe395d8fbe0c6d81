"""After ``warmup``, epochs of training and evaluation compile nothing, whatever is ambient in both."""

import contextlib

import pytest
import torch
from torch import nn
from torch.export import Dim

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, ConvNet, Parent

LAST = IMAGE[:4].clone()  # the last batch of an epoch is smaller


def marked():
    x = IMAGE.clone()
    torch._dynamo.mark_dynamic(x, 0)
    return x


def build(kind):
    model = ConvNet()
    if kind == "bound":
        model = cm.bind(torch.export.export(model, (IMAGE,)))
    if kind == "bound, dynamic":
        model = cm.bind(torch.export.export(model, (IMAGE,), dynamic_shapes=({0: Dim("batch", min=2)},)))
    call = torch.compile(model, backend="pt2e_modes", dynamic=True if kind == "dynamic" else None)
    return Parent(call) if kind == "nested" else call


def epochs(call, batches, contexts, ambient):
    """Two epochs of training, each with an evaluation in each grad mode behind it."""
    optimizer = torch.optim.AdamW(call.parameters(), lr=0.01)
    for _ in range(2):
        call.train()
        for x in batches:
            optimizer.zero_grad()
            with ambient():
                loss = call(x).float().square().sum()
            loss.backward()
            optimizer.step()
        call.eval()
        for context in contexts:
            for x in batches:
                with context(), ambient():
                    call(x)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "batches", "ambient"),
    [
        ("eager", [IMAGE], contextlib.nullcontext),
        ("bound", [IMAGE], autocast),
        ("eager", [marked(), LAST], contextlib.nullcontext),
        ("bound, dynamic", [marked(), LAST], contextlib.nullcontext),
        ("nested", [IMAGE], autocast),
        ("eager", [IMAGE], autocast),
        ("dynamic", [IMAGE, LAST], contextlib.nullcontext),
        ("bound", [IMAGE], contextlib.nullcontext),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.every(10)
def test_epochs_compile_nothing(kind, batches, ambient, compiled):
    first = marked() if len(batches) == 2 and "dynamic" not in kind[:7] else batches[0]
    call = build(kind)
    contexts = [torch.no_grad, torch.enable_grad, torch.inference_mode]
    with ambient():
        cm.warmup(call, first, grad={"eval": [False, True, "inference"]}, progress=False)
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    assert before[0] > 0
    epochs(call, [first, *batches[1:]], contexts, ambient)
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before


@pytest.mark.slow
def test_named_modes_compile_nothing_more(compiled):
    """A schedule that freezes one block after another, with evaluations between."""
    model = ConvNet()
    call = torch.compile(model, backend="pt2e_modes")
    schedule = ["train", {"block1*": "eval", "*": "train"}, {"block*": "eval", "*": "train"}]
    cm.warmup(call, IMAGE, modes=[*schedule, "eval"], progress=False)
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    assert before == (4, 4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for frozen in ([], [model.block1], [model.block1, model.block2]):
        call.train()
        for block in frozen:
            block.eval()
        for _ in range(2):
            optimizer.zero_grad()
            call(IMAGE).sum().backward()
            optimizer.step()
        call.eval()
        with torch.no_grad():
            call(IMAGE)
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before


def test_a_frozen_parameter_is_another_graph_and_is_warmed_up_as_it_is(compiled):
    model = ConvNet()
    for parameter in model.block1.parameters():
        parameter.requires_grad_(False)
    call = torch.compile(nn.Sequential(model), backend="pt2e_modes")
    cm.warmup(call, IMAGE, progress=False)
    before = (graphs_compiled(), compiled.forward, compiled.backward)
    epochs(call, [IMAGE], [torch.no_grad], contextlib.nullcontext)
    assert (graphs_compiled(), compiled.forward, compiled.backward) == before
