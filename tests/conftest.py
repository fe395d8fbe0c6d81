import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from compile_modes import _compat, messages

# Programs that tests start import what the tests themselves do; and one thread each, for all of it is small.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test with the mark ``every(n)``, runs the first of each n by default: the others are slow."""
    cases: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Iterator[None]:
    """Keeps pytest from listening to torch's structured trace, for which torch would put every graph into words."""
    logging.getLogger("torch.__trace").handlers.clear()
    yield


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts with no compiled code, no counts, no memory of warnings, and Inductor drawing as eager does."""
    torch._dynamo.reset()
    callspec = getattr(request.node, "callspec", None)
    for value in (*vars(request.module).values(), *(callspec.params.values() if callspec else ())):
        if isinstance(value, torch.Tensor):
            vars(value).clear()  # Dynamo notes on inputs of dynamic=True that their sizes vary, and reset() leaves it
    counters.clear()
    messages.WARNED.clear()
    torch.manual_seed(0)
    with inductor_config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the backend hand its graphs to AOTAutograd without a compiler: the same autograd, no C++ builds."""

    def handover(mode: str | None, options: dict[str, object]):
        return torch._dynamo.lookup_backend("aot_eager")

    monkeypatch.setattr(_compat, "inductor", handover)


@pytest.fixture
def listening():
    """Someone wants to see the graphs, so that each is captured, whether or not a form has work in it."""
    logger = logging.getLogger("compile_modes")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)
