import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn

import compile_modes as cm
from nets import IMAGE, TOKENS, Attention, Auxiliary, ConvNet, DropPath, Residual
from oracle import agrees, same_state, text
from setups import nets

MODELS = [
    *nets("conv", "activations", "regions", "attention"),
    pytest.param(Auxiliary, IMAGE, id="two-programs"),
    pytest.param(lambda: Residual(DropPath(0.3), nn.Dropout(0.2)), IMAGE, id="drop-path"),
    pytest.param(lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Dropout(0.1)), IMAGE, id="cumulative"),
]


def train(module, x, steps=2):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for seed in range(steps):
        torch.manual_seed(seed)
        output = module.train()(x)
        output = output[0] if isinstance(output, tuple) else output
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("build", "x"), MODELS)
@pytest.mark.every(6)
def test_a_trained_module_comes_back_with_its_weights_and_modes(build, x, tmp_path):
    model = build()
    module = cm.export(model, (x,))
    train(module, x)
    module.eval()
    some = next(name for name, m in module.named_modules() if name and not m._modules)
    module.get_submodule(some).train()
    file = tmp_path / "model.pt2"
    cm.save(module, file)
    loaded = cm.load(file)
    assert type(loaded) is type(module) or isinstance(loaded, torch.fx.GraphModule)
    same_state(module, loaded, 0.0)
    assert {n: m.training for n, m in loaded.named_modules()} == {n: m.training for n, m in module.named_modules()}
    reference = build()
    reference.load_state_dict(loaded.state_dict())
    agrees(reference, loaded, inputs=[x], flips=1, tolerance=1e-6 if build is MODELS[-1].values[0] else 0.0)
    cm.save(loaded, file)
    same_state(loaded, cm.load(file), 0.0)


@pytest.mark.parametrize("start", [True, False])
def test_a_bound_program_comes_back_as_it_was_bound(start, tmp_path):
    bound = cm.bind(torch.export.export(ConvNet().train(start), (IMAGE,)), keep=["block1.*"])
    file = tmp_path / "model.pt2"
    cm.save(torch.compile(bound), file)
    loaded = cm.load(file)
    assert text(loaded) == text(bound)
    assert loaded.training is start


def test_supplied_probabilities_come_back(tmp_path):
    bound = cm.bind(torch.export.export(Attention(0.3).eval(), (TOKENS,)), dropout_p={"": 0.3})
    cm.save(bound, tmp_path / "model.pt2")
    reference = Attention(0.3)
    loaded = cm.load(tmp_path / "model.pt2")
    reference.load_state_dict(loaded.state_dict())
    agrees(reference, loaded, inputs=[TOKENS], flips=1, tolerance=0.0)


def test_frozen_parameters_and_copies(tmp_path):
    module = copy.deepcopy(cm.export(Auxiliary(), (IMAGE,)))
    module.net.block1.requires_grad_(False)
    train(module, IMAGE)
    cm.save(module, tmp_path / "model.pt2")
    loaded = cm.load(tmp_path / "model.pt2")
    same_state(module, loaded, 0.0)
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == wanted


@pytest.mark.slow
def test_loads_in_a_new_process_without_the_class(tmp_path):
    module = cm.export(Auxiliary(), (IMAGE,))
    train(module, IMAGE)
    cm.save(module.eval(), tmp_path / "model.pt2")
    torch.save({"x": IMAGE, "eval": module(IMAGE)}, tmp_path / "expected.pt")
    script = """
import sys, torch, compile_modes as cm
module, expected = cm.load(sys.argv[1]), torch.load(sys.argv[2])
assert not module.training and torch.equal(module(expected["x"]), expected["eval"])
assert isinstance(module.train()(expected["x"]), tuple)
module.eval()
assert not torch.equal(module(expected["x"]), expected["eval"]), "statistics have moved in train"
"""
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, timeout=300, cwd=tmp_path)


def test_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(600, 600), nn.BatchNorm1d(600), nn.Dropout(0.1))
    x = torch.randn(4, 600)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "one.pt2")
    cm.save(cm.export(model, (x,)), tmp_path / "both.pt2")
    assert (tmp_path / "both.pt2").stat().st_size < 1.1 * (tmp_path / "one.pt2").stat().st_size


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConvNet(), "was not made from an ExportedProgram"),
        (lambda: cm.bind(torch.export.export(ConvNet(), (IMAGE,)).module()), "was not made from an ExportedProgram"),
        (lambda: cm.bake(cm.bind(torch.export.export(ConvNet(), (IMAGE,)))), "edited after it was bound"),
    ],
)
def test_what_cannot_be_saved_says_why(make, says, tmp_path):
    with pytest.raises(cm.ArchiveError, match=says):
        cm.save(make(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(ConvNet(), (IMAGE,)), file)
    with pytest.raises(cm.ArchiveError):
        cm.load(file)
    cm.save(cm.bind(torch.export.export(ConvNet(), (IMAGE,))), file)
    whole = file.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(cm.ArchiveError):
            cm.load(file)
    with pytest.raises(cm.ArchiveError):
        cm.load(tmp_path / "missing.pt2")


def test_an_input_named_as_a_builtin_is_kept_where_a_region_returns_nothing():
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            with torch.no_grad():
                self.steps.add_(1)
            return x + 1

    module, file = cm.export(nn.Sequential(Count(), nn.Dropout(0.2)), (torch.ones(2, 4),)), io.BytesIO()
    cm.save(module, file)  # nn.Sequential's argument is called "input"
    file.seek(0)
    loaded = cm.load(file).eval()
    assert torch.equal(loaded(torch.ones(2, 4)), torch.full((2, 4), 2.0))
    assert loaded.get_buffer("0.steps") == 1
