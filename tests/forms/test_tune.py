"""The option ``tune``: eval-mode batch norms folded into convolutions, in graphs that autograd follows."""

import copy
import logging

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

import compile_modes as cm
from compile_modes import _compat
from compile_modes.forms import lower
from graphs import graphs_compiled
from oracle import agrees, same, same_gradients, same_steps
from setups import bound, compile_

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def settled(model, dtype=torch.float32):
    """A model whose norms are in eval, with statistics and weights that are no identity."""
    generator = torch.Generator().manual_seed(5)
    for module in model.train().modules():
        if isinstance(module, NORMS):
            module.eval()
            for tensor, low in ((module.running_mean, -1.0), (module.running_var, 0.5), (module.weight, 0.5)):
                if tensor is not None:
                    tensor.data.uniform_(low, low + 1.5, generator=generator)
    return model.to(dtype)


def freeze(model):
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


class Net(nn.Module):
    """Something linear, a norm, and what comes behind."""

    def __init__(self, linear, norm, behind=F.relu):
        super().__init__()
        self.linear, self.norm, self.behind = linear, norm, behind

    def forward(self, x):
        return self.behind(self.norm(self.linear(x)))


class Shared(nn.Module):
    """A convolution's weight with two norms, and a norm with two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3, eps=1e-2), nn.BatchNorm2d(3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.other(self.first(x)))
        return torch.tanh(self.norm(self.second(x)))


def without_bias():
    norm = nn.BatchNorm2d(4)
    norm.bias = None
    return Net(nn.Conv2d(3, 4, 3, bias=False), norm)


def pooled(x):
    return torch.tanh(F.max_pool2d(F.relu(x), 3, stride=2, padding=1, ceil_mode=True))


def pooled_in_place(x):
    return torch.tanh(F.max_pool2d(F.relu(x, inplace=True), 2))


def pooled_and_used(x):
    x = F.relu(x)
    return torch.tanh(F.max_pool2d(x, 2)).mean() + torch.tanh(x)


IMAGE, WIDE = (4, 3, 8, 8), (4, 3, 16)
FOLDED = {
    "conv2d": (lambda: Net(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4, eps=1e-3)), IMAGE, 1),
    "no-bias": (lambda: Net(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), IMAGE, 1),
    "no-beta": (without_bias, IMAGE, 1),
    "same-padding": (lambda: Net(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4)), IMAGE, 1),
    "groups": (lambda: Net(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE, 1),
    "in-place": (lambda: Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGE, 1),
    "pooled": (lambda: Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pooled), IMAGE, 1),
    "pooled-in-place": (lambda: Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pooled_in_place), IMAGE, 1),
    "pooled-and-used": (lambda: Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pooled_and_used), IMAGE, 1),
    "conv1d": (lambda: Net(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), WIDE, 1),
    "conv3d": (lambda: Net(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 6, 6, 6), 1),
    "transposed": (lambda: Net(nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)), IMAGE, 1),
    "linear": (lambda: Net(nn.Linear(3, 4), nn.BatchNorm1d(4)), (8, 3), 1),
    "shared": (Shared, IMAGE, 3),
}


class Log(list):
    """What became of each norm."""

    def folded(self):
        return sum(form.startswith("folded") for _, form in self)


@pytest.fixture
def forms(monkeypatch):
    log = Log()
    monkeypatch.setattr(lower.logs, "forms", lambda chosen: log.extend(chosen))
    return log


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.every(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", FOLDED.values(), ids=FOLDED)
def test_gradients_are_those_of_eager(case, dtype, forms):
    build, shape, count = case
    reference = settled(build(), dtype)
    module = copy.deepcopy(reference)
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    same_steps(reference, module, compile_(module, tune=True), inputs[:1], tolerance=tolerance)
    assert (forms.folded(), len(forms)) == (count, count)
    inputs[0].grad = None
    outputs = reference(inputs[0]), compile_(module, tune=True)(inputs[1])
    for output in outputs:
        output.square().sum().backward()
    same("output", *outputs, 10 * tolerance)
    same("gradient of the input", inputs[0].grad, inputs[1].grad, 10 * tolerance)


class Two(nn.Module):
    """A residual block."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.drop(torch.relu(self.bn2(self.conv2(y)) + x))


IMAGES = torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [settled, lambda model: bound(settled(model), IMAGES)], ids=["eager", "exported"])
def test_fine_tuning_with_flips(build, forms, no_inductor):
    model = settled(Two())
    module = build(copy.deepcopy(model))

    def touch(m, count=[0]):  # noqa: B006
        """Norms wake up in every second round."""
        count[0] += 1
        for name in ("bn1", "bn2"):
            if (count[0] - 1) // 4 % 2 == 0:
                getattr(m, name).eval()

    agrees(model, module, compile_(module, tune=True), [IMAGES], touch=touch, flips=3, tolerance=1e-5)
    assert forms.folded() >= 2


@pytest.mark.slow
def test_with_inductor(forms):
    model = settled(Two())
    module = copy.deepcopy(model)
    same_steps(model, module, compile_(module, tune=True), [IMAGES], tolerance=1e-5)
    assert forms.folded() == 2


@pytest.mark.usefixtures("no_inductor")
def test_an_override_freezes_and_folds(forms):
    model = settled(Two())
    module = copy.deepcopy(model).train()
    compiled = compile_(module, overrides={"bn*": "eval"}, tune=True)
    same_steps(model, module, compiled, [IMAGES], tolerance=1e-5)
    assert forms.folded() == 2


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)


class Written(Pointwise):
    """Statistics that the model writes itself, before they are used."""

    def forward(self, x):
        self.norm.running_var.mul_(1.5)
        return torch.relu(self.norm(self.linear(x)))


class Learned(Pointwise):
    """The same statistics in eval and, behind that, in train."""

    def forward(self, x):
        y = torch.relu(self.norm(self.linear(x)))
        return F.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True)


class Between(Pointwise):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.linear(x)
        return torch.relu(self.norm(y))


class Used(Pointwise):
    def forward(self, x):
        y = self.linear(x)
        return torch.relu(self.norm(y)) + y


class Computed(Pointwise):
    def forward(self, x):
        return torch.relu(self.norm(F.conv2d(x, self.linear.weight * 2.0)))


class Checkpointed(Pointwise):
    def forward(self, x):
        def inner(x):
            return torch.relu(self.norm(self.linear(x)))

        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).sin()


class NoGrad(Pointwise):
    def forward(self, x):
        with torch.no_grad():
            y = torch.relu(self.norm(self.linear(x)))
        return y + self.linear.bias.sum()


class Gated(Pointwise):
    """Squeeze and excitation: the gate's gradient needs the norm's output."""

    def forward(self, x):
        y = torch.relu(self.norm(self.linear(x)))
        return self.linear(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


class Squared(Pointwise):
    def forward(self, x):
        y = self.norm(self.linear(x))
        return y * y


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


DECLINED = {
    "not-affine": (lambda: Net(conv(), nn.BatchNorm2d(4, affine=False)), IMAGE, "norm needs no gradient"),
    "frozen-gamma": (lambda: frozen(Net(conv(), nn.BatchNorm2d(4)), "norm.weight"), IMAGE, "norm needs no gradient"),
    "frozen-weight": (lambda: frozen(Net(conv(), nn.BatchNorm2d(4)), "linear.weight"), IMAGE, "in front needs no"),
    "no-grad": (NoGrad, IMAGE, "norm needs no gradient"),
    "unbatched-3d-linear": (lambda: Net(nn.Linear(3, 4), nn.BatchNorm1d(5)), (4, 5, 3), "batch dimension"),
    "transposed-groups": (
        lambda: Net(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE, "convolution in groups",
    ),
    "silu": (lambda: Net(conv(), nn.BatchNorm2d(4), nn.SiLU(inplace=True)), IMAGE, "the output of the norm again"),
    "gelu": (lambda: Net(conv(), nn.BatchNorm2d(4), F.gelu), IMAGE, "the output of the norm again"),
    "square": (Squared, IMAGE, "the output of the norm again"),
    "gate": (Gated, IMAGE, "the output of the norm again"),
    "written": (Written, IMAGE, "running_var is computed in the graph"),
    "between": (Between, IMAGE, "stands between"),
    "used": (Used, IMAGE, "used elsewhere"),
    "computed-weight": (Computed, IMAGE, "w is computed in the graph"),
    "checkpoint": (Checkpointed, IMAGE, "body of a region"),
}  # fmt: skip


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.every(2)
@pytest.mark.parametrize("case", DECLINED.values(), ids=DECLINED)
def test_norms_that_stay_say_why(case, forms):
    build, shape, reason = case
    reference = settled(build())
    module = copy.deepcopy(reference)
    same_steps(reference, module, compile_(module, tune=True), [torch.randn(shape)], steps=2, tolerance=1e-5)
    assert [reason in form for _, form in forms] == [True], forms


@pytest.mark.usefixtures("no_inductor")
def test_statistics_that_the_graph_writes(forms):
    compile_(settled(Learned()), tune=True)(IMAGES)  # eager's own gradients are off here
    assert ["writes to a parameter or to statistics" in form for _, form in forms] == [True]


def forget(module):
    module.norm.running_mean = module.norm.running_var = None


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("touch", [nn.Module.train, forget], ids=["in-train", "without-statistics"])
def test_norms_by_batch_statistics_are_left_alone(touch, forms):
    reference = settled(Net(conv(), nn.BatchNorm2d(4)))
    touch(reference)
    module = copy.deepcopy(reference)
    same_steps(reference, module, compile_(module, tune=True), [IMAGES], tolerance=1e-4)
    assert not forms


@pytest.mark.usefixtures("no_inductor")
def test_without_gradients_nothing_is_folded(forms):
    module = settled(Two()).eval()
    with torch.no_grad():
        same("output", module(IMAGES), compile_(module, tune=True)(IMAGES), 1e-6)
    assert (forms.folded(), len(forms)) == (0, 2)


def handed_over(monkeypatch, module, **options):
    """The graphs that the backend hands over, as text, with all tags."""
    seen = []

    def handover(mode, options):
        def run(gm, inputs):
            tags = [(n.name, n.meta["recompute"]) for n in gm.graph.nodes if "recompute" in n.meta]
            seen.append((gm.print_readable(print_output=False), tags, torch.compiler.config.cache_key_tag))
            return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(_compat, "inductor", handover)
        torch._dynamo.reset()
        compile_(module, **options)(IMAGES).sum().backward()
    return seen


def test_without_the_option_nothing_changes(monkeypatch):
    module = settled(Two())
    monkeypatch.setattr(lower, "tune", None)  # not even called
    assert handed_over(monkeypatch, module) == handed_over(monkeypatch, module, tune=False)
    (_, tags, key), = handed_over(monkeypatch, module)  # fmt: skip
    assert (tags, key) == ([], "")


def test_new_nodes_and_no_others_are_tagged(monkeypatch):
    module = settled(Two())
    (plain, _, _), = handed_over(monkeypatch, module)  # fmt: skip
    (text, tags, key), = handed_over(monkeypatch, module, tune=True)  # fmt: skip
    assert {policy for _, policy in tags} == {CheckpointPolicy.MUST_RECOMPUTE}
    assert key
    assert "rsqrt" in text
    assert "batch_norm" not in text
    assert all(f"{name} = " in text for name, _ in tags)
    assert not [name for name, _ in tags if "conv" in name or "relu" in name]
    assert "rsqrt" not in plain


class TestSizes:
    """What is known of sizes when the choice is made must hold in every call."""

    @pytest.mark.usefixtures("no_inductor")
    def test_any_batch_in_one_graph(self, forms):
        model = settled(Two())
        module = copy.deepcopy(model)
        compiled = compile_(module, tune=True)
        before = graphs_compiled()
        for batch in (4, 3, 7, 2):
            x = torch.randn(batch, *IMAGE[1:])
            torch._dynamo.maybe_mark_dynamic(x, 0)
            same_steps(model, module, compiled, [x], steps=1, tolerance=1e-5)
        assert graphs_compiled() - before <= 2
        assert forms.folded() == len(forms) >= 2

    @pytest.mark.usefixtures("no_inductor")
    def test_few_outputs_for_many_weights(self, forms):
        module = settled(Net(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)))
        compile_(module, tune=True)(torch.randn(1, 64, 3, 3)).sum().backward()
        assert ["too few for 36864 weights" in form for _, form in forms] == [True]


def distance(ours, exact):
    return max(float((a.grad.double() - b.grad).norm() / b.grad.norm()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("where", ["autocast", "bfloat16"])
def test_lower_precision_is_as_exact_as_eager(where, forms):
    exact = settled(Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.tanh), torch.float64)
    dtype = torch.bfloat16 if where == "bfloat16" else torch.float32
    eager, module = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(dtype)
    compiled = compile_(module, tune=True)
    for model, call in ((exact, exact), (eager, eager), (module, compiled)):
        x = IMAGES.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast" and model is not exact):
            y = call(x)
        y.double().square().mean().backward()
    errors = [distance(m.parameters(), list(exact.parameters())) for m in (eager, module)]
    assert errors[1] < max(2 * errors[0], 0.02)
    assert forms.folded() == 1


def partitioned(mode, options):
    """Inductor up to the two graphs, run as they are."""

    def run(gm, inputs):
        return compile_fx(gm, inputs, inner_compile=lambda graph, *args, **kwargs: graph)

    return run


def saved_bytes(module, x, **options):
    """What a compiled forward pass keeps for the backward pass, parameters, buffers and the input left out."""
    torch._dynamo.reset()
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), x)}
    compiled = compile_(module, **options)
    compiled(x).sum().backward()
    output = compiled(x)
    held, waiting, seen = {}, [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for t in (*getattr(node, "saved_tensors", ()), *getattr(node, "_tensors_no_vc_check", ())):
            if t.untyped_storage().data_ptr() not in own:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(held.values())


@pytest.fixture
def _partitioned(monkeypatch):
    monkeypatch.setattr(_compat, "inductor", partitioned)
    with inductor_config.patch(force_disable_caches=True):
        yield


class Behind(nn.Module):
    """Convolutions around a norm and what comes behind it."""

    def __init__(self, behind, last=True):
        super().__init__()
        self.first, self.conv = nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.behind = behind

    def forward(self, x):
        return self.last(self.behind(self.norm(self.conv(self.first(x))), self.scale))


BEHIND = {
    "relu": lambda x, p: F.relu(x),
    "relu-in-place": lambda x, p: F.relu(x, inplace=True),
    "relu6": lambda x, p: F.relu6(x),
    "hardtanh": lambda x, p: F.hardtanh_(x),
    "leaky_relu": lambda x, p: F.leaky_relu(x),
    "hardsigmoid": lambda x, p: F.hardsigmoid(x),
    "sigmoid": lambda x, p: torch.sigmoid(x),
    "tanh": lambda x, p: torch.tanh(x),
    "clamp": lambda x, p: x.clamp(-1, 1),
    "add": lambda x, p: F.relu(x + p),
    "sub": lambda x, p: p - x,
    "cat": lambda x, p: torch.cat([x[:, 4:], x[:, :4]], 1),
    "dropout": lambda x, p: F.dropout(x),
    "dropout2d": lambda x, p: F.dropout2d(x),
    "mean": lambda x, p: x.mean((2, 3), keepdim=True),
    "sum": lambda x, p: x.sum((2, 3), keepdim=True),
    "avg_pool": lambda x, p: F.avg_pool2d(x, 2),
    "adaptive": lambda x, p: F.adaptive_avg_pool2d(x, 2),
    "max_pool": lambda x, p: F.max_pool2d(x, 2),
    "relu-and-max_pool": lambda x, p: F.max_pool2d(F.relu(x), 2),
    "conv": lambda x, p: x,
    "matmul": lambda x, p: x @ x.transpose(-1, -2),
    "constant": lambda x, p: x * 2.0,
    "detached": lambda x, p: F.relu(x) + F.silu(x.detach()).mean(),
    "conv-and-silu": lambda x, p: F.silu(x) + F.conv2d(x, p.expand(8, 8, 1, 1)),
    # Nothing is gained, and nothing is changed:
    "silu": lambda x, p: F.silu(x),
    "relu-and-silu": lambda x, p: F.relu(x) + F.silu(x),
    "sum-into-gelu": lambda x, p: F.gelu(x + p),
    "scale": lambda x, p: x * p,
    "gate": lambda x, p: F.relu(x) * torch.sigmoid(F.relu(x).mean((2, 3), keepdim=True)),
}
NO_GAIN = {"silu", "relu-and-silu", "sum-into-gelu", "scale", "gate"}


@pytest.mark.usefixtures("_partitioned")
@pytest.mark.every(5)
@pytest.mark.parametrize("name", BEHIND)
def test_it_gains_where_it_is_chosen(name, forms):
    module = settled(Behind(BEHIND[name]))
    x = torch.randn(4, 8, 16, 16)
    stock, ours = saved_bytes(module, x), saved_bytes(module, x, tune=True)
    assert forms.folded() == (0 if name in NO_GAIN else 1), forms
    assert ours == stock if name in NO_GAIN else ours <= stock - 0.7 * 4 * 8 * 14 * 14 * 4


@pytest.mark.usefixtures("_partitioned")
@pytest.mark.parametrize("relu", [F.relu, F.relu_, torch.relu])
def test_nothing_is_kept_of_a_relu_before_a_max_pool(relu, forms):
    """Neither its mask, of 196 elements for each channel and image, nor anything of that size in its place."""

    def pool(x):
        return F.max_pool2d(x, 2)

    module, plain = (settled(Behind(behind)) for behind in (lambda x, p: pool(relu(x)), lambda x, p: pool(x)))
    x = torch.randn(4, 8, 16, 16)
    assert saved_bytes(module, x, tune=True) == saved_bytes(plain, x, tune=True)
    assert forms.folded() == 2


def test_a_relu_behind_a_max_pool_is_exact_among_equal_values():
    """Of each window, whether its values are above zero or not, and equal or not, the gradient has the same place."""
    values = torch.randint(-2, 3, (4, 8, 16, 16)).float()
    gradients = []
    for run in (lambda x: F.max_pool2d(F.relu(x), 3, 2, 1), lambda x: F.relu(F.max_pool2d(x, 3, 2, 1))):
        x = values.clone().requires_grad_()
        result = run(x)
        (result * torch.arange(result.numel()).view_as(result)).sum().backward()
        gradients.append((result, x.grad))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.usefixtures("_partitioned")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnet_x_400mf"])
def test_half_of_what_fine_tuning_keeps(name):
    models = pytest.importorskip("torchvision.models")
    module = settled(models.get_model(name))
    x = torch.randn(8, 3, 128, 128)
    assert saved_bytes(module, x, tune=True) <= 0.5 * saved_bytes(module, x)


class TestCache:
    """AOTAutograd's cache takes graphs that differ in tags for the same."""

    @pytest.mark.slow
    @pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["tagged-first", "untagged-first"])
    def test_tagged_and_untagged_share_no_entry(self, order, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        held = {}
        for tagged in (*order, *order):
            module = settled(Net(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)))
            counters.clear()
            with monkeypatch.context() as patch:
                if not tagged:
                    patch.setattr(lower, "tune", untagged(lower.tune))
                size = saved_bytes(module, torch.randn(2, 3, 16, 16), tune=True)
            hit = counters["aot_autograd"]["autograd_cache_hit"]
            assert bool(hit) is (tagged in held)
            assert held.setdefault(tagged, size) == size
        assert held[True] < held[False]


def untagged(tune):
    def run(view, found):
        pairs = tune(view, found)
        for node in view.nodes():
            node.meta.pop("recompute", None)
        return pairs

    return run


@pytest.mark.usefixtures("no_inductor")
def test_the_log_names_each_norm(caplog):
    with caplog.at_level(logging.DEBUG, "compile_modes"):
        compile_(settled(Two()), tune=True)(IMAGES).sum().backward()
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "batch_norm (aten.batch_norm.default, owner 'bn1', eval): folded into conv2d" in said


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_an_unusable_value(value):
    with pytest.raises(cm.OptionError, match=f"CM123: tune is {value!r}"):
        compile_(Two(), tune=value)(IMAGES)


def test_gradients_of_a_bound_module_at_once(forms, no_inductor):
    model = settled(Two())
    module = bound(model, IMAGES)
    freeze(model)
    for path in ("bn1", "bn2"):
        module.get_submodule(path).eval()
    model.drop.eval()
    module.drop.eval()
    model(IMAGES).sum().backward()
    compile_(module, tune=True)(IMAGES).sum().backward()
    same_gradients(model, module, 1e-5)
    assert forms.folded() == 2
