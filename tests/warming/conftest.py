import pytest
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from compile_modes import _compat


class Compiled:
    """How many graphs have reached a compiler below AOTAutograd."""

    forward = backward = 0


@pytest.fixture
def compiled(monkeypatch):
    """Counts forward and backward graphs where Inductor would compile them."""
    counts = Compiled()

    def count(name):
        def compiler(gm, example_inputs):
            setattr(counts, name, getattr(counts, name) + 1)
            return make_boxed_func(gm.forward)

        return compiler

    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    monkeypatch.setattr(_compat, "inductor", lambda mode, options: backend)
    return counts
