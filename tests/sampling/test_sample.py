"""``sample``: the results of single calls, each with random numbers of its own, and a module that is as it was."""

import warnings

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.sampling.finding import find, only_in_train
from sampling.injected import Recorded, Replayed
from sampling.kinds import IMAGES, KINDS, Called, DropPath, X, encoder


@pytest.fixture(autouse=True)
def _strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", cm.ModeWarning)
        yield


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def live(model, x):
    return [model.get_submodule(drawing.name) for drawing in find(model, (x,), {}).drawing]


def net(p=0.5):
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 2))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_same_random_numbers_it_is_the_loop(kind, chunk):
    model, x = KINDS[kind]()
    cm.sample(model, x, n=2)  # what finds out draws numbers, too
    n = 3 if chunk is None else chunk
    with torch.no_grad(), Recorded() as recorded:
        ours = first(cm.sample(model, x, n=n, chunk=chunk))
    assert recorded.drawn
    with torch.no_grad(), only_in_train(model, live(model, x)):
        for i in range(n):
            with Replayed(recorded.drawn, i) as replayed:
                theirs = first(model(x.clone()))
            assert not replayed.left
            loose = {"atol": 2e-2, "rtol": 2e-2} if kind == "regions" else {}  # which has a layer in bfloat16
            torch.testing.assert_close(ours[i], theirs, **loose)
    assert any(not torch.equal(ours[0], ours[i]) for i in range(1, n)) or kind == "one mask for a batch"


@pytest.mark.parametrize("kind", KINDS)
def test_equal_in_distribution_to_the_loop(kind):
    model, x = KINDS[kind]()
    with torch.no_grad():
        ours = first(cm.sample(model, x, n=600))
        with only_in_train(model, live(model, x)):
            theirs = torch.stack([first(model(x.clone())) for _ in range(600)])
    error = (theirs.var(0) / 600 + ours.var(0) / 600).sqrt() + 1e-6
    assert ((ours.mean(0) - theirs.mean(0)).abs() / error).max() < 5.5
    spread = theirs.var(0).mean()
    assert 0.8 < ours.var(0).mean() / spread < 1.25
    assert (ours[0] != ours[1:]).flatten(1).any(1).float().mean() > 0.4  # a mask for a batch has two values


def test_rrelu_has_slopes_of_its_own():
    model = nn.Sequential(nn.RReLU(0.1, 0.4))
    ours = cm.sample(model, torch.full((2000,), -1.0), n=2)
    assert (ours[0] != ours[1]).all()
    assert ((ours <= -0.1) & (ours >= -0.4)).all()
    assert abs(ours.mean() + 0.25) < 0.01
    assert abs(ours.std() - 0.3 / 12**0.5) < 0.01
    dropped = cm.sample(nn.Sequential(model, nn.Dropout(0.5)), torch.ones(2, 3), n=2)
    assert set(dropped.unique().tolist()) <= {0.0, 2.0}


def test_rrelu_in_eval_has_its_mean_slope():
    model = nn.Sequential(nn.Dropout(0.5), nn.RReLU(0.1, 0.3, inplace=True))
    ours = cm.sample(model, torch.full((100,), -1.0), n=3, which=("0",))
    assert {round(v, 4) for v in ours.flatten().tolist()} == {0.0, -0.4}


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_is_left_behind(mode):
    model = net().train(mode == "train")
    model[3].train(mode != "eval")
    flags = [m.training for m in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    cm.sample(model, X)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_arguments_are_not_written_to():
    x = X.clone()
    cm.sample(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)), x)
    assert torch.equal(x, X)


def test_buffers_that_eval_writes_are_not_written():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.drop(torch.ones_like(x)) * 0 + self.calls

    model = Counting()
    assert (cm.sample(model, X, n=4) == 1).all()
    assert model.calls == 0


def test_what_comes_before_runs_once():
    model = net()
    cm.sample(model, X)
    with Recorded() as recorded, torch.profiler.profile() as profile:
        cm.sample(model, X, n=12, chunk=3)
    assert len(recorded.drawn) == 4
    ran = {event.key: event.count for event in profile.key_averages()}
    assert ran["aten::batch_norm"] == 1
    assert ran["aten::bernoulli_"] == 4


def test_seeds_repeat_and_leave_the_generator():
    model = net()
    state = torch.get_rng_state()
    a = cm.sample(model, X, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, cm.sample(model, X, seed=1))
    assert not torch.equal(a, cm.sample(model, X, seed=2))
    assert not torch.equal(cm.sample(model, X), cm.sample(model, X))


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_moments_are_those_of_all_results(chunk):
    model = net()
    results = cm.sample(model, X, n=20, seed=0, chunk=chunk)
    mean, deviation = cm.sample(model, X, n=20, seed=0, chunk=chunk, reduce="mean_std")
    torch.testing.assert_close(mean, results.mean(0))
    torch.testing.assert_close(deviation, results.std(0))


def test_a_function_gets_each_result_in_turn():
    model = net()
    results = cm.sample(model, X, n=5, seed=0, chunk=2)
    folded = cm.sample(model, X, n=5, seed=0, chunk=2, reduce=lambda state, y: [*(state or []), y])
    assert torch.equal(torch.stack(folded), results)


def test_outputs_of_all_kinds():
    model = Called(lambda s, x: {"y": s.drop(x), "x": x.sum(1), "none": None, "three": (3, "s")})
    result = cm.sample(model, X, n=4)
    assert result["y"].shape == (4, 5, 8)
    assert result["none"] is None
    assert result["three"] == (3, "s")
    assert torch.equal(result["x"], X.sum(1).expand(4, 5))
    mean, deviation = cm.sample(model, X, n=4, reduce="mean_std")
    torch.testing.assert_close(mean["x"], X.sum(1))
    assert not deviation["x"].any()
    assert deviation["three"] == (3, "s")


def test_gradients_are_those_of_the_loop():
    model = net().double().requires_grad_()
    x = X.double().requires_grad_()
    cm.sample(model, x, n=2)
    with Recorded() as recorded:
        ours = cm.sample(model, x, n=3)
    wanted = [*model.parameters(), x]
    grads = torch.autograd.grad(ours.square().sum(), wanted)
    with only_in_train(model, [model[3]]):
        theirs = []
        for i in range(3):
            with Replayed(recorded.drawn, i):
                theirs.append(model(x))
    for one, other in zip(grads, torch.autograd.grad(torch.stack(theirs).square().sum(), wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model = net()
    with mode():
        result = cm.sample(model, X)
        assert (result[0] != result[1]).any()
        assert not result.requires_grad
    assert cm.sample(model, X).requires_grad


def test_autocast_is_that_of_the_call():
    model = net()
    cm.sample(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert cm.sample(model, X).dtype is torch.bfloat16
    assert cm.sample(model, X).dtype is torch.float32


def test_weights_are_read_live():
    model = net()
    cm.sample(model, X)
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.fill_(3.0)
    assert (cm.sample(model, X) == 3).all()
    model[4].bias = nn.Parameter(torch.full((2,), 4.0))
    assert (cm.sample(model, X) == 4).all()
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()}, assign=True)
    assert (cm.sample(model, X) == 0).all()


def changed_p(model):
    model[3].p = 0.999


def replaced(model):
    model[3] = nn.Dropout(0.999)


def hooked(model):
    model.register_forward_hook(lambda m, args, y: y * 0)


@pytest.mark.parametrize("change", [changed_p, replaced, hooked])
def test_what_has_changed_is_seen(change):
    model = net(0.1)
    with torch.no_grad():
        model[4].bias.zero_()
        assert (cm.sample(model, X) != 0).float().mean() > 0.9
        change(model)
        assert (cm.sample(model, X) != 0).float().mean() < 0.2


def test_other_sizes_and_dtypes():
    model = net()
    for x in (X, X[:2], torch.ones(1, 8)):
        assert cm.sample(model, x, n=3).shape == (3, len(x), 2)
    assert cm.sample(model.double(), X.double(), n=3).dtype is torch.float64


def test_globs_choose():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(8))
        model[1].bias.zero_()
        one = cm.sample(model, torch.ones(5, 8), which="0")
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert set(cm.sample(model, torch.ones(5, 8)).unique().tolist()) == {0.0, 4.0}


def test_dropouts_in_the_fast_path_of_transformer_layers():
    model = encoder().eval().requires_grad_(False)
    result = cm.sample(model, torch.ones(2, 5, 8), n=3, which=("layers.1.dropout1",))
    assert (result[0] != result[1]).any()


def bound(model):
    return cm.bind(torch.export.export(model.eval(), (X,)))


def both(model):
    return cm.export(model, (X,))


def optimized(model):
    return torch.compile(model, backend="aot_eager_decomp_partition")


def in_place(model):
    model.compile(backend="aot_eager_decomp_partition")
    return model


def with_overrides(model):
    return torch.compile(model, backend="pt2e_modes", options={"overrides": {"3": "train"}})


@pytest.mark.parametrize("make", [bound, both, optimized, in_place, with_overrides])
@pytest.mark.usefixtures("no_inductor")
def test_bound_and_compiled_modules(make):
    model = net()
    module = make(model)
    flags = {name: m.training for name, m in module.named_modules()}
    with torch.no_grad():
        ours = cm.sample(module, X, n=400, chunk=150)
        theirs = cm.sample(model, X, n=400)
    assert ours.shape == (400, 5, 2)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.15
    assert 0.7 < ours.var(0).mean() / theirs.var(0).mean() < 1.4
    assert (ours[1:] != ours[0]).any(-1).any(-1).float().mean() > 0.99
    assert {name: m.training for name, m in module.named_modules()} == flags
    assert model[1].num_batches_tracked == 0


@pytest.mark.slow
def test_many_models_compile_without_reaching_a_limit():
    models = [optimized(net()) for _ in range(12)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for model in models:
            assert cm.sample(model, X, n=2).shape == (2, 5, 2)


def test_images_with_stochastic_depth_in_every_block():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), DropPath(), nn.Linear(512, 2))
    result = cm.sample(model, IMAGES, n=40)
    assert result.shape == (40, 2, 2)
    assert model[1].num_batches_tracked == 0
    assert len(result[:, 0].unique(dim=0)) == 2  # a sample is kept or not


def bert():
    transformers = pytest.importorskip("transformers")
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **config)), torch.arange(14).view(2, 7)


def vit():
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    rates = {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.3,
    }
    return timm.models.VisionTransformer(**small, **rates), torch.linspace(-1, 1, 6144).view(2, 3, 32, 32)


def swin():
    swin_transformer = pytest.importorskip("torchvision").models.SwinTransformer
    small = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": [4, 4]}
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth_prob": 0.3, "num_classes": 5}
    return swin_transformer(**small, **rates), torch.linspace(-1, 1, 6144).view(2, 3, 32, 32)


def resnet():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.3, drop_block_rate=0.3, zero_init_last=False)
    return model, torch.linspace(-1, 1, 24576).view(2, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, vit, swin, resnet])
def test_whole_models_with_the_same_random_numbers(make):
    model, x = make()
    model.eval()
    cm.sample(model, x, n=2)
    with torch.no_grad(), Recorded() as recorded:
        ours = first(cm.sample(model, x, n=3))
    with torch.no_grad(), only_in_train(model, live(model, x)):
        for i in range(3):
            with Replayed(recorded.drawn, i) as replayed:
                theirs = first(model(x))
            assert not replayed.left
            torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=1e-4)
    assert (ours[0] != ours[1]).any()
