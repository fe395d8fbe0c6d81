"""What goes wrong when it is done by hand: vectors of few elements, counters, masks, aliases, a constant."""

import concurrent.futures
import gc
import os

import pytest
import torch

import compile_modes as cm
from package.conftest import write_small
from package.packages import Small, squares

pytestmark = pytest.mark.slow
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def packed(compiled):
    return cm.load_package(compiled("small", write_small))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def test_updates_to_vectors_of_few_elements_count(packed, model):
    """Inductor inlines constants of one dimension and at most 8 elements, unless it is told otherwise."""
    for module in (packed, model):
        with torch.no_grad():
            module.gain.mul_(3)
            module.bn.running_mean.add_(1)
            module.first.bias.fill_(2)
            module.offset.fill_(0.5)
    torch.testing.assert_close(packed.eval()(X), model.eval()(X))


def test_counters_count_in_train_only(packed):
    for step in range(5):
        packed.train()(X, X)
        packed.eval()(X)
        packed.mode("mc")(X)
        assert packed.bn.num_batches_tracked == step + 1


def test_buffers_stand_still_in_eval(packed):
    packed.train()(X, X)
    before = {name: value.clone() for name, value in packed.named_buffers()}
    packed.eval()(X)
    packed.mode("mc")(X)
    assert all(torch.equal(value, before[name]) for name, value in packed.named_buffers())
    packed.train()(X, X)
    assert not torch.equal(packed.bn.running_mean, before["bn.running_mean"])


def masks(packed, count):
    """Which elements a dropout has let through, and their scale."""
    with torch.no_grad():
        packed.bn.bias.fill_(1)
        packed.bn.weight.zero_()
    constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return torch.stack([packed(X)[0] - constant for _ in range(count)])


def test_masks_are_fresh_at_each_call_right_in_the_mean_and_seedable(packed):
    packed.mode("mc")
    found = masks(packed, 100)  # 25,600 elements: one deviation of the mean is 0.003
    assert set(found.unique().tolist()) <= {0.0, 2.0}
    assert abs((found > 0).double().mean() - 0.5) < 0.015
    assert abs(found.mean() - 1) < 0.03
    assert abs(found.var() - 1) < 0.03
    assert len({tuple(mask.flatten().tolist()) for mask in found}) == 100
    torch.manual_seed(3)
    first = packed(X)[0]
    assert not torch.equal(packed(X)[0], first)
    torch.manual_seed(3)
    assert torch.equal(packed(X)[0], first)


def test_gradients_are_those_of_the_mask_that_was_drawn(packed):
    """Where a mask lets nothing through, no gradient comes back."""
    packed.train()
    loss, (outputs, _) = packed(X, X)
    loss.backward()
    through = outputs != torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = (2 * (outputs - X) * through).sum(0) / X.numel()  # of the bias of the norm, times 1 / (1 - p) and gain
    torch.testing.assert_close(packed.bn.bias.grad, 2 * expected, atol=1e-5, rtol=1e-4)


def test_aliases_follow_what_they_are_views_of(packed):
    assert packed.part.data_ptr() == packed.gain.data_ptr()
    with torch.no_grad():
        packed.gain.fill_(5)
    torch.testing.assert_close(packed.eval()(X)[1], torch.tensor(10.0))


def test_buffers_that_are_not_saved_are_in_the_package(packed):
    assert "offset" not in packed.state_dict()
    assert "offset" in dict(packed.named_buffers())


@pytest.mark.parametrize("count", [2, 7, 64])
def test_batches_of_any_size_in_each_mode(count, packed, model):
    for module in (packed, model):
        module.eval()
    torch.testing.assert_close(packed(X[:count]), model(X[:count]))
    torch.testing.assert_close(packed(X[:1]), model(X[:1]))
    loss, (outputs, _) = packed.train()(X[:count], X[:count])
    torch.testing.assert_close(loss, squares((outputs,), X[:count]))


def test_strides_that_were_not_compiled_for_give_the_same(packed, model):
    turned = X.t().contiguous().t()
    assert not turned.is_contiguous()
    torch.testing.assert_close(packed.eval()(turned), model.eval()(turned))
    torch.testing.assert_close(packed(X.repeat(1, 2)[:, 4:]), model(X))


def test_threads_train_and_evaluate_together(packed):
    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 4, generator=generator)
        return [packed(x)[0].sum().item() for _ in range(20)]

    packed.eval()
    alone = [work(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == alone
    packed.train()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        losses = list(pool.map(lambda _: packed(X, X)[0], range(40)))
    assert packed.bn.num_batches_tracked == 40
    for loss in losses:
        loss.backward()


def test_weights_are_replaced_by_load_state_dict_and_data(packed, model):
    packed.eval()(X)
    state = {name: value * 2 for name, value in model.eval().state_dict().items()}
    state["part"] = state["gain"][:2]
    for module in (packed, model):
        module.load_state_dict(state, assign=True)
    torch.testing.assert_close(packed(X), model(X))
    for module in (packed, model):
        module.first.weight.data = torch.ones(4, 4)
    torch.testing.assert_close(packed(X), model(X))


def test_nothing_is_left_in_the_folder_for_temporary_files(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    packed = cm.load_package(compiled("small", write_small))
    packed.eval()(X)
    del packed
    gc.collect()
    assert os.listdir(tmp_path) == []
