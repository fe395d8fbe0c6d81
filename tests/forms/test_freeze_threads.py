"""Threads that call while one trains: every output is that of one whole parameter set."""

import copy
import threading

import pytest
import torch
from torch import nn

import compile_modes as cm
from deployed import frozen, runs_on_constants, settle

STEPS = 30


def callers(call, x, count, seen, errors, stop):
    def body():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    seen.append(call(x).clone())
        except Exception as error:
            errors.append(error)

    return [threading.Thread(target=body) for _ in range(count)]


def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.Linear(32, 4)).eval()


def whole(outputs, sets):
    """Whether each output is near to that of one of the sets, and how many sets occur."""
    sets = torch.stack(sets).flatten(1)
    outputs = torch.stack(outputs).flatten(1)
    nearest = torch.cdist(outputs.double(), sets.double()).min(1)
    gaps = (sets[1:] - sets[:-1]).norm(dim=1)
    assert nearest.values.max() < 1e-4 < gaps.min() / 10
    return len(nearest.indices.unique())


@pytest.mark.every(8)
@pytest.mark.parametrize("kind", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_eight_threads_call_while_one_trains(kind, pause):
    model = build()
    call = frozen(model)
    x = torch.randn(2, 3, 8, 8)
    settle(call, x)
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}, "for-loop": {"foreach": False}}[kind]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, **options)
    seen, errors, stop, sets = [], [], threading.Event(), []
    threads = callers(call, x, 8, seen, errors, stop)
    for thread in threads:
        thread.start()
    try:
        for _ in range(STEPS):
            sets.append(settle(copy.deepcopy(model), x, calls=1))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            stop.wait(pause)
    finally:
        sets.append(settle(copy.deepcopy(model), x, calls=1))
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert whole(seen, sets) > 2
    torch.testing.assert_close(settle(call, x), sets[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_while_it_is_frozen():
    model = build()
    call = frozen(model)
    x = torch.randn(2, 3, 8, 8)
    settle(call, x, calls=1)
    seen, errors, stop = [], [], threading.Event()
    threads = callers(call, x, 2, seen, errors, stop)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for thread in threads:
        thread.start()
    for _ in range(20):
        model(x).square().sum().backward()
        optimizer.step()
        stop.wait(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    torch.testing.assert_close(settle(call, x), settle(model, x, calls=1), rtol=1e-5, atol=1e-5)
    assert runs_on_constants() == [True]


def test_two_threads_with_a_model_each():
    first, second = build(), build()
    nn.init.normal_(second[3].weight)
    call = torch.compile(lambda model, x: model(x), backend="pt2e_modes", options={"freeze": "auto"})
    x = torch.randn(2, 3, 8, 8)
    for model in (first, second):
        settle(call, model, x)
    failures = []

    def body(model):
        expected = settle(model, x, calls=1)
        for _ in range(300):
            if not torch.allclose(settle(call, model, x, calls=1), expected, atol=1e-5):
                failures.append(model)

    threads = [threading.Thread(target=body, args=(model,)) for model in (first, second) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_invalidate_from_another_thread():
    model = build()
    call = frozen(model)
    x = torch.randn(2, 3, 8, 8)
    expected = settle(call, x)
    thread = threading.Thread(target=cm.invalidate, args=(model,))
    thread.start()
    thread.join()
    torch.testing.assert_close(settle(call, x), expected)
