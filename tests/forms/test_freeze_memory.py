"""The memory of frozen weights stays the user's: it may move, change its size and be shared, and no write is lost."""

import warnings

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.forms.deploy.running import DEPLOYED
from deployed import agrees, compiled, frozen, runs_on_constants, says, settle

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.a(x), self.b(x)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(64))

    def forward(self, x):
        return self.linear(x) + self.cache[:64]


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["auto", "strict"])
def test_weights_that_move_to_shared_memory(freeze):
    """What they leave is given back to the system: to read there would end the process."""
    model = nn.Linear(4096, 4096, bias=False).eval()
    x = torch.randn(2, 4096)
    call = frozen(model, freeze)
    agrees(call, model, x)
    model.share_memory()
    agrees(call, model, x)
    with torch.no_grad():
        model.weight.mul_(2.0)
    agrees(call, model, x)
    assert runs_on_constants() == [True]


@pytest.mark.every(2)
@pytest.mark.parametrize("freeze", ["auto", "strict"])
def test_storages_can_be_resized(freeze):
    model = Cached().eval()
    call = frozen(model, freeze)
    agrees(call, model, X)
    model.cache.resize_(128).fill_(3.0)
    agrees(call, model, X)
    storage, weight = model.linear.weight.untyped_storage(), model.linear.weight.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)  # as offloading does
    storage.resize_(size)
    with torch.no_grad():
        model.linear.weight.copy_(weight)
    agrees(call, model, X)


@pytest.mark.slow
def test_a_write_to_one_element_of_a_large_weight():
    """Its version counter is all that shows it."""
    model = nn.Linear(64, 64).eval()
    call = frozen(model)
    agrees(call, model, X)
    assert runs_on_constants() == [True]
    with torch.no_grad():
        model.weight[20, 3] = 9.0
    agrees(call, model, X)


class Tokens(nn.Module):
    """Attention's projection, of tokens whose batch does not come first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 24)

    def forward(self, x):
        return self.linear(x.transpose(0, 1))


def test_constants_are_no_larger_than_what_they_are_made_of():
    """Where no weight needs a gradient, ATen multiplies one copy of it for each token."""
    model, x = Tokens().eval(), torch.randn(2, 50, 8)
    call = frozen(model)
    agrees(call, model, x)
    (constants,) = (its for graph in DEPLOYED for its in graph.sets)
    assert all(value.numel() <= 8 * 24 or value.is_mkldnn for value in constants._values.values())


def overlapping(model):
    flat = torch.randn(6144, generator=torch.Generator().manual_seed(1))
    model.a.weight.data, model.b.weight.data = flat[:4096].view(64, 64), flat[2048:].view(64, 64)


def tied(model):
    model.b.weight.data = model.a.weight.data


@pytest.mark.parametrize(("share", "later"), [(overlapping, False), (tied, False), (tied, True)])
def test_weights_that_share_memory_run_in_the_stock_form(share, later):
    """A write to one of them leaves no trace on the other."""
    model = Pair().eval()
    call = frozen(model)
    if later:
        assert says(call, model, X) == []
        assert runs_on_constants() == [True]
    share(model)
    (said,) = says(call, model, X)
    assert "share memory" in said
    with torch.no_grad():
        model.a.weight[47, 0] = 50.0
    agrees(call, model, X)


def test_neighbours_in_one_buffer_share_nothing():
    model, flat = Pair().eval(), torch.randn(8192)
    model.a.weight.data, model.b.weight.data = flat[:4096].view(64, 64), flat[4096:].view(64, 64)
    assert says(frozen(model), model, X) == []
    assert runs_on_constants() == [True]


@pytest.mark.slow
def test_wide_statistics_are_seen_to_change_anywhere():
    """Eager's kernels write to statistics without a trace, here not to the first, the last and those in the middle."""
    model = nn.Sequential(nn.BatchNorm1d(8192), nn.Linear(8192, 8)).eval()
    x = torch.rand(16, 8192) * (torch.rand(8192) > 0.3) + 1.0
    for still in (slice(16), slice(4096, 4112), slice(-16, None)):
        x[:, still] = 0.0
    call = frozen(model)
    agrees(call, model, x)
    with torch.no_grad():
        model.train()(x)
    agrees(call, model.eval(), x, tolerance=1e-4)


def test_where_parameters_are_swapped_none_is_watched(monkeypatch):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Linear(64, 64).eval()
        call = frozen(model)
        (said,) = says(call, model, X)
        assert "swapped" in said
        model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
        agrees(call, model, X)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("no_inductor")
def test_the_warning_can_be_an_error():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="CM418", category=cm.ModeWarning)
        with pytest.raises(Exception, match="CM418: a graph runs in its stock form") as raised:
            frozen(nn.Linear(64, 64).double().eval())(X.double())
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, cm.ModeWarning)


@pytest.mark.slow
def test_warmup_leaves_nothing_to_compile():
    model = Cached()
    call = frozen(model)
    cm.warmup(call, X, progress=False)
    before = compiled()
    settle(call.eval(), X)
    assert compiled() == before
    assert runs_on_constants() == [True]
