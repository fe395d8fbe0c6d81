"""The deploy form equals eager after every kind of write, and compiles nothing for it."""

import copy
import gc

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.forms.deploy.running import DEPLOYED
from deployed import X, agrees, compiled, frozen, net, runs_on_constants, settle


def step(model, kind=torch.optim.SGD, **options):
    optimizer = kind(model.parameters(), lr=0.05, **options)
    model(X).square().mean().backward()
    return optimizer


def optimized(kind, **options):
    return lambda model, call: step(model, kind, **options).step()


def optimized_compiled(model, call):
    torch.compile(step(model, torch.optim.AdamW).step, backend="aot_eager")()


def trained(model, call):
    with torch.no_grad():
        model.train()(X + 1)
    model.eval()


def trained_compiled(model, call):
    model.train()
    call(X + 1).mean().backward()
    model.eval()


def loaded(assign):
    def write(model, call):
        state = {name: value * 1.25 for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return write


@torch.no_grad()
def copied(model, call):
    model.conv2.weight.copy_(model.conv2.weight * 1.5)


def data(model, call):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.75


@torch.no_grad()
def averaged(model, call):
    other = [torch.rand_like(parameter) for parameter in model.parameters()]
    for parameter, average in zip(model.parameters(), other, strict=True):
        kept = parameter.clone()
        parameter.copy_(average)
        average.copy_(kept)


def mean(model, call):
    model.bn2.running_mean.add_(0.5)


def halved(model, call):
    model.half().float()


def in_data(model, call):
    model.fc[0].weight.data.add_(0.1)


WRITES = {
    "sgd": optimized(torch.optim.SGD, foreach=False),
    "foreach": optimized(torch.optim.AdamW, foreach=True),
    "fused": optimized(torch.optim.AdamW, fused=True),
    "compiled step": optimized_compiled,
    "train": trained,
    "compiled train": trained_compiled,
    "load": loaded(False),
    "assign": loaded(True),
    "copy_": copied,
    "data": data,
    "average": averaged,
    "running_mean": mean,
    "half": halved,
    "data.add_": in_data,
}


@pytest.mark.every(36)
@pytest.mark.parametrize("freeze", ["auto", "strict"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_equals_eager_after(write, freeze):
    model = net()
    call = frozen(model, freeze)
    agrees(call, model, X)
    assert runs_on_constants() == [True]
    for again in (False, True):
        before = [t.clone() for t in (*model.parameters(), *model.buffers())]
        write(model, call)
        pairs = zip(before, (*model.parameters(), *model.buffers()), strict=True)
        assert again or any(not torch.equal(one, other) for one, other in pairs)
        agrees(call, model, X)
        assert any(runs_on_constants())


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_writes_compile_nothing(times):
    model = net()
    call = frozen(model)
    settle(call, X)
    before = compiled()
    for number in range(times):
        with torch.no_grad():
            (model.bn1.weight, model.conv3.weight, model.fc[3].bias)[number % 3].mul_(1.01)
        agrees(call, model, X)
        assert runs_on_constants() == [True]
    assert compiled() == before


def one_element(model):
    model.fc[0].weight.data[31, 7] += 3.0


def by_numpy(model):
    model.fc[0].weight.detach().numpy()[31, 7] += 3.0


@pytest.mark.slow
@pytest.mark.every(2)
@pytest.mark.parametrize("write", [one_element, by_numpy])
def test_writes_that_leave_no_trace_take_strict_or_a_word(write):
    model = net()
    with torch.no_grad():
        model.fc[0].weight.abs_()
        model.fc[0].bias.fill_(5.0)  # so that every element shows
    automatic, strict = frozen(model), frozen(model, "strict")
    settle(automatic, X)
    settle(strict, X)
    write(model)
    agrees(strict, model, X)
    with pytest.raises(AssertionError):
        agrees(automatic, model, X)
    cm.invalidate(model)
    agrees(automatic, model, X)
    assert runs_on_constants() == [True, True]


@pytest.mark.slow
def test_training_is_untouched():
    reference, model = net(), net()
    reference.drop.p = model.drop.p = 0.0
    call = frozen(model)
    settle(call, X)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    for _ in range(3):
        for m, run, optimizer in zip((reference, model), (reference, call), optimizers, strict=True):
            m.train()
            optimizer.zero_grad()
            run(X).square().mean().backward()
            optimizer.step()
            m.eval()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-4)
        result = call(X)
        assert result.requires_grad  # grad-enabled eval runs in its stock form
        with torch.no_grad():
            torch.testing.assert_close(call(X), result, rtol=1e-5, atol=1e-5)
    assert runs_on_constants() == [False]


@pytest.mark.slow
def test_a_loop_that_trains_in_between_computes_no_constants():
    model = net()
    call = frozen(model)
    for _ in range(6):
        step(model).step()
        agrees(call, model, X, calls=1)
    assert not any(runs_on_constants())
    assert sum(its._rested for graph in all_graphs() for its in graph.sets) == 0


def all_graphs():
    return list(DEPLOYED)


def test_only_what_depends_on_a_write_is_computed_again(monkeypatch):
    model = net()
    call = frozen(model)
    settle(call, X)
    (graph,) = all_graphs()
    computed = []
    recipe = graph._graph._recipe
    run = recipe.run
    monkeypatch.setattr(recipe, "run", lambda slots, weights: computed.append(len(slots)) or run(slots, weights))
    with torch.no_grad():
        model.fc[3].bias.mul_(2.0)
    agrees(call, model, X)
    with torch.no_grad():
        model.bn1.running_var.mul_(2.0)
    agrees(call, model, X)
    cm.invalidate(model)
    agrees(call, model, X)
    assert computed == [1, 2, len({*graph._graph._slots.values()})]


@pytest.mark.slow
def test_copies_have_constants_of_their_own_and_take_them_along():
    model = net()
    call = frozen(model)
    settle(call, X)
    other = copy.deepcopy(model)
    nn.init.normal_(other.fc[3].bias)
    again = frozen(other)
    settle(again, X)
    agrees(call, model, X)
    agrees(again, other, X)
    assert sum(runs_on_constants()) == 2
    del again, other
    gc.collect()
    assert sum(len(graph.sets) for graph in all_graphs()) == 1


def test_weights_are_held_by_the_model_alone():
    model = net()
    call = frozen(model)
    settle(call, X)
    gc.collect()
    address = model.fc[0].weight.data_ptr()
    dense = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.layout == torch.strided]
    sharing = [t for t in dense if t.device.type == "cpu" and t.dtype == torch.float32 and t.data_ptr() == address]
    assert len(sharing) == 1


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = one(block, x)
        return x


def one(block, x):
    return torch.tanh(block(x))


@pytest.mark.slow
def test_repeated_blocks_share_code_and_not_constants():
    model = net(Blocks)
    call = frozen(model)
    x = torch.randn(2, 16)
    agrees(call, model, x, calls=6)
    with torch.no_grad():
        model.blocks[1][0].weight.mul_(0.5)
    agrees(call, model, x, calls=6)
    assert runs_on_constants() == [True] * 3
    assert len([graph for graph in all_graphs() if graph.sets]) == 1


def test_no_random_numbers_are_drawn():
    model = net()
    call = frozen(model)
    before = torch.get_rng_state()
    settle(call, X)
    assert torch.equal(torch.get_rng_state(), before)
