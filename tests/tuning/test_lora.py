import copy
import io

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.tuning import editing
from tuning.twins import BATCH, Tuned, X, bound, program, steps, twin, wake

LAYERS = ["stem", "wide", "grouped", "fc1", "fc2", "head.1"]


def tuned(targets="*", *, train=True, r=2, alpha=6, dropout=0.3, **options):
    model = Tuned()
    module = bound(model, train=train, dynamic_shapes=BATCH)
    assert cm.lora(module, targets, r, alpha, dropout, **options) is module
    wake(module)
    return model, module


@pytest.mark.parametrize("train", [True, False], ids=["train-export", "eval-export"])
def test_adapters_train_as_in_eager(train):
    model, module = tuned(train=train)
    eager = twin(model, module, LAYERS, 0.3, 3.0)
    assert steps([eager, module], X, 20) < 1e-5
    for name in LAYERS:
        for part in ("lora_A", "lora_B"):
            ours, theirs = (m.get_submodule(f"{name}.{part}").weight for m in (module, eager))
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(module.bn.num_batches_tracked, eager.bn.num_batches_tracked)
    assert torch.equal(module.fc1.weight, model.fc1.weight)


def test_adapters_train_as_in_eager_when_compiled(no_inductor):
    model, module = tuned()
    eager = twin(model, module, LAYERS, 0.3, 3.0)
    assert steps([eager, torch.compile(module, backend="pt2e_modes")], X, 8) < 1e-5


def test_a_compiled_module_compiles_anew(no_inductor):
    module = bound(Tuned()).eval()
    step = torch.compile(nn.Sequential(module), backend="pt2e_modes")
    before = step(X)
    cm.lora(module, "fc1", r=2)
    wake(module)
    after = step(X)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, module(X), atol=1e-6)


def test_nothing_changes_at_first_and_all_else_is_frozen():
    module = bound(Tuned()).eval()
    before = module(X)
    cm.lora(module, ("fc*", "stem"), dropout=0.5)
    assert torch.allclose(module(X), before, atol=1e-6)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{part}.weight" for n in ("fc1", "fc2", "stem") for part in ("lora_A", "lora_B")}
    assert module.fc1.lora_A.weight.shape == (8, 4)
    assert module.fc1.lora_B.weight.shape == (6, 8)
    assert module.stem.lora_A.weight.shape == (8, 3, 3, 3)
    assert module.stem.lora_B.weight.shape == (4, 8, 1, 1)
    assert not module.fc1.lora_B.weight.any()
    bound_of_init = 1 / 4**0.5  # kaiming_uniform(a=sqrt(5)): sqrt(6 / ((1 + 5) * fan_in))
    assert 0 < module.fc1.lora_A.weight.abs().max() <= bound_of_init


def test_the_dropout_of_an_adapter_is_a_site_of_its_layer():
    _, module = tuned("fc1", dropout=0.25)
    (site,) = [site for site in cm.sites(module) if site.owner == "fc1.lora_dropout"]
    assert (site.bound, site.p, site.training) == (True, 0.25, True)
    module.fc1.eval()
    assert "fc1.lora_dropout" in cm.explain(module)
    assert [site.training for site in cm.sites(module) if site.owner == "fc1.lora_dropout"] == [False]
    baked = cm.bake(copy.deepcopy(module))
    torch.manual_seed(1)
    expected = module(X)
    torch.manual_seed(1)
    assert torch.equal(baked(X), expected)


def test_without_dropout_there_is_no_site():
    _, module = tuned("fc1", dropout=0.0)
    assert not hasattr(module.fc1, "lora_dropout")


@pytest.mark.parametrize("train", [True, False], ids=["train-export", "eval-export"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["whole", "decomposed"])
@pytest.mark.every(4)
def test_files_copies_and_exports_have_the_adapters(train, decomposed, recwarn):
    program = torch.export.export(Tuned().train(train), (X,), dynamic_shapes=BATCH)
    module = cm.bind(program.run_decompositions() if decomposed else program)
    cm.lora(module, "*", 2, 6, 0.3)
    wake(module)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    loaded = cm.load(file)
    assert list(loaded.state_dict()) == list(module.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in module.parameters()]
    assert loaded.fc1.lora_dropout.training is module.fc1.lora_dropout.training
    again = cm.bind(torch.export.export(copy.deepcopy(module).train(), (X,)))
    assert steps([module, loaded, copy.deepcopy(module), again], X, 8) == 0.0


@pytest.mark.parametrize("decomposed", [False, True], ids=["whole", "decomposed"])
@pytest.mark.every(2)
def test_merged_weights_give_what_the_adapters_gave(decomposed):
    program = torch.export.export(Tuned(), (X,), dynamic_shapes=BATCH)
    module = cm.bind(program.run_decompositions() if decomposed else program).eval()
    text, keys = str(module.graph), list(module.state_dict())
    cm.lora(module, "*", 2, 6, 0.3, exclude="grouped")
    wake(module)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    loaded, weight = cm.load(file), module.fc1.weight
    before = module(X)
    assert cm.merge(module) is module
    assert torch.allclose(module(X), before, atol=1e-5)
    assert module.fc1.weight is weight
    assert (str(module.graph), list(module.state_dict())) == (text, keys)
    assert torch.allclose(cm.merge(loaded)(X), before, atol=1e-5)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert torch.equal(cm.load(file)(X), module(X))
    with pytest.raises(cm.TuningError, match="CM260"):
        cm.merge(module)


def test_a_dropout_of_the_model_in_front_of_a_layer_stays():
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    module = bound(model, x)
    text = str(module.graph)
    cm.lora(module, "1", 2)
    wake(module)
    cm.merge(module)
    assert str(module.graph) == text


def test_the_root_itself_may_be_the_layer():
    x = torch.randn(3, 4)
    module = bound(nn.Linear(4, 2), x)
    cm.lora(module, "*", 2)
    wake(module)
    before = module(x)
    assert list(module.state_dict()) == ["weight", "bias", "lora_A.weight", "lora_B.weight"]
    assert torch.allclose(cm.merge(module)(x), before, atol=1e-6)
    assert list(module.state_dict()) == ["weight", "bias"]


def test_grouped_convolutions_are_not_merged():
    _, module = tuned(("grouped", "fc1"))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    code = module.code
    with pytest.raises(cm.TuningError, match=r"CM261: the adapter of 'grouped' can't be folded: .* 2 groups"):
        cm.merge(module)
    assert module.code == code
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.out(self.layer(self.embed(x)))


def test_a_tied_weight_has_an_adapter_at_its_layer_and_is_not_merged():
    tokens = torch.randint(0, 7, (2, 3))
    module = bound(Tied(), tokens).eval()
    cm.lora(module, ("out", "layer.self_attn.in_proj"), r=2)
    wake(module)
    assert "embed.lora_A.weight" not in module.state_dict()
    assert module.layer.self_attn.in_proj.lora_B.weight.shape == (12, 2)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert torch.equal(cm.load(file)(tokens), module(tokens))
    with pytest.raises(cm.TuningError, match=r"CM261: .*'out'.* also used by embedding"):
        cm.merge(module)


def test_a_packed_projection_is_merged():
    tokens = torch.randint(0, 7, (2, 3))
    module = bound(Tied(), tokens).eval()
    keys = list(module.state_dict())
    cm.lora(module, "layer.self_attn.*", r=2)
    wake(module)
    before = module(tokens)
    cm.merge(module)
    assert torch.allclose(module(tokens), before, atol=1e-5)
    assert list(module.state_dict()) == keys
    assert not hasattr(module.layer.self_attn, "in_proj")


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        with torch.no_grad():
            z = self.fc(x)
        return self.out(y.float()) + self.out(z)


def test_layers_inside_regions_have_adapters_that_are_merged():
    x, model = torch.randn(3, 4), Casting()
    module = bound(model, x)
    text = str(module.graph)
    cm.lora(module, "*", 2, 2, 0.3)
    wake(module)
    eager = twin(model, module, ["fc", "out"], 0.3, 1.0)
    assert steps([eager, module], x, 8) < 1e-5
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert steps([module, cm.load(file)], x, 8) == 0.0
    module.eval()
    before = module(x)
    cm.merge(module)
    assert torch.allclose(module(x), before, atol=2e-2)  # bfloat16
    assert str(module.graph) == text


def test_exports_of_both_modes_are_tuned_if_they_are_one_graph():
    model = Tuned()
    module = cm.export(copy.deepcopy(model), (X,))
    cm.lora(module, "fc*", 2, 6, 0.3)
    wake(module)
    eager = twin(model, module, ["fc1", "fc2"], 0.3, 3.0)
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    assert steps([eager, module, cm.load(file)], X, 8) < 1e-5


def test_a_second_call_leaves_the_adapters_of_the_first():
    _, module = tuned("fc1")
    cm.lora(module, "fc2", 3, modules_to_save="head")
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"fc1.lora_A.weight", "fc2.lora_B.weight", "head.1.weight"} < trained
    assert "fc1.weight" not in trained
    assert module.fc2.lora_A.weight.shape == (3, 6)


def test_adapters_alone_are_saved_and_loaded(tmp_path):
    _, module = tuned()
    torch.save(cm.lora_state_dict(module), tmp_path / "adapters.pt")
    other = bound(Tuned())
    other.load_state_dict({k: v for k, v in module.state_dict().items() if "lora" not in k})
    cm.lora(other, "*", 2, 6, 0.3)
    state = torch.load(tmp_path / "adapters.pt", weights_only=True)
    assert state.keys() == {f"{name}.{part}.weight" for name in LAYERS for part in ("lora_A", "lora_B")}
    cm.load_lora(other, {f"base_model.model.{name}": value for name, value in state.items()})
    assert torch.equal(other.eval()(X), module.eval()(X))
    assert cm.lora_state_dict(module, modules_to_save="head").keys() - state.keys() == {"head.1.weight", "head.1.bias"}


def test_states_that_do_not_fit_are_refused():
    _, module = tuned("fc*")
    state = {name: value.clone() for name, value in cm.lora_state_dict(module).items()}
    lacking = {name: value for name, value in state.items() if name != "fc1.lora_A.weight"}
    with pytest.raises(cm.TuningError, match=r"CM263: the state lacks 'fc1.lora_A.weight'"):
        cm.load_lora(module, lacking)
    with pytest.raises(cm.TuningError, match=r"CM264: .*'fc1.lora_a.weight'(.|\n)*'fc1.lora_A.weight'"):
        cm.load_lora(module, {**state, "fc1.lora_a.weight": state["fc1.lora_A.weight"]})
    other = {**{name: value + 1 for name, value in state.items()}, "fc2.lora_B.weight": torch.zeros(6, 3)}
    with pytest.raises(cm.TuningError, match=r"CM265: 'fc2.lora_B.weight' has shape \(6, 3\)"):
        cm.load_lora(module, other)
    assert all(torch.equal(value, state[name]) for name, value in cm.lora_state_dict(module).items())
    with pytest.raises(cm.TuningError, match="CM262"):
        cm.lora_state_dict(bound(Tuned()))


def test_an_interrupted_call_leaves_everything_as_it_was(monkeypatch):
    module = bound(Tuned())
    cm.lora(module, "fc1", 2)
    module.fc2.weight.requires_grad_(True)
    module.drop.eval()

    def seen():
        flags = {name: m.training for name, m in module.named_modules()}
        grads = {name: p.requires_grad for name, p in module.named_parameters()}
        return module.code, str(module.graph), flags, grads, {n: v.clone() for n, v in module.state_dict().items()}

    before = seen()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(editing.Source, "stay_with", interrupted)
    for call in (lambda: cm.lora(module, "*2", 2), lambda: cm.merge(module), lambda: head(module)):
        with pytest.raises(KeyboardInterrupt):
            call()
        after = seen()
        assert after[:4] == before[:4]
        assert all(torch.equal(value, before[4][name]) for name, value in after[4].items())
    monkeypatch.undo()
    file = io.BytesIO()
    cm.save(module, file)


def head(module):
    return cm.replace_head(module, "head", nn.Linear(6, 2))


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.up = nn.MultiheadAttention(4, 2, 0.1), nn.ConvTranspose1d(4, 4, 2)
        self.lora_A = nn.Linear(4, 4)

    def forward(self, x):
        return self.lora_A(self.attn(x, x * 2, x * 3, need_weights=False)[0]), self.up(x.mT)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: cm.lora(m, "fc11"), r"CM253: the pattern 'fc11' .*\n.*\n.*did you mean 'fc1'"),
        (lambda m: cm.lora(m, "1"), r"CM253: .*\n.*\n.*'\*\.1' matches 'head.1'"),
        (lambda m: cm.lora(m, "fc1", exclude="fcx"), r"CM253: the pattern 'fcx'"),
        (lambda m: cm.lora(m, "fc1", modules_to_save="haed"), r"CM253: .*'haed'.*\n.*\n.*did you mean 'head'"),
        (lambda m: cm.lora(m, "bn"), "CM253"),
        (lambda m: cm.lora(m, ()), "CM257"),
        (lambda m: cm.lora(m, 3), "CM252"),
        (lambda m: cm.lora(m, [3]), "CM252"),
        (lambda m: cm.lora(m, "fc1", exclude="fc*"), "CM258"),
        (lambda m: cm.lora(m, "fc1", r=0), "CM254"),
        (lambda m: cm.lora(m, "fc1", r=2.0), "CM254"),
        (lambda m: cm.lora(m, "fc1", alpha=-1), "CM255"),
        (lambda m: cm.lora(m, "fc1", dropout=1.0), "CM256"),
        (lambda m: cm.lora(m, "*", r=3), "CM259: the layer 'grouped' .*2 groups"),
    ],
)
def test_what_can_not_be_asked_of_lora(call, says):
    module = cm.bind(program())
    with pytest.raises(cm.CompileModesError, match=says):
        call(module)
    assert "lora" not in module.code
    assert all(p.requires_grad for p in module.parameters())


def test_a_layer_has_one_adapter():
    _, module = tuned("fc1")
    with pytest.raises(cm.TuningError, match=r"CM259: the layer 'fc1' .*it has one"):
        cm.lora(module, "fc*")


def test_layers_that_can_not_have_adapters_are_refused_by_name():
    module = bound(Cross(), torch.randn(3, 2, 4))
    with pytest.raises(cm.TuningError, match=r"CM259: the layer 'attn.in_proj' .*packed"):
        cm.lora(module, "attn.*")
    with pytest.raises(cm.TuningError, match=r"CM259: the layer 'up' .*transposed"):
        cm.lora(module, "up")
    cm.lora(module, ("attn.out_proj", "lora_A"))
    normed = bound(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), torch.randn(2, 4))
    with pytest.raises(cm.TuningError, match=r"CM259: the layer '0' .*computed"):
        cm.lora(normed, "*")
    assert module.lora_A.lora_A.weight.shape == (8, 4)


def test_modules_that_are_not_bound_or_more_than_one_graph_are_refused():
    program = torch.export.export(Tuned(), (X,))
    with pytest.raises(cm.TuningError, match="CM250"):
        cm.lora(program.module(), "fc1")
    with pytest.raises(cm.BindError, match="CM205"):
        cm.lora(program, "fc1")
    with pytest.raises(cm.BindError, match="CM201"):
        cm.lora(Tuned(), "fc1")

    class Deciding(Tuned):
        def forward(self, x):
            return super().forward(x) * (2 if self.training else 1)

    class Auxiliary(Tuned):
        def forward(self, x):
            return (super().forward(x), x) if self.training else super().forward(x)

    for kind, holds in ((Deciding, "switches"), (Auxiliary, "two programs")):
        with pytest.raises(cm.TuningError, match=f"CM251: .*{holds}"):
            cm.lora(cm.export(kind(), (X,)), "fc1")
