import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from nets import IMAGE, Auxiliary, ConvNet, Norms
from tuning.twins import Tuned, X, bound


def test_what_is_frozen_is_said():
    module = bound(Tuned())
    report = cm.freeze(module, ("stem", "bn", "*.bias"))
    assert_expected_inline(
        str(report),
        """\
7 parameters (135 elements) frozen, 306 train
  stem.weight
  stem.bias
  bn.weight
  bn.bias
  wide.bias
  fc1.bias
  head.1.bias
1 norms in eval
  bn""",
    )
    assert not module.bn.training
    assert module.drop.training
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == {*report.parameters}


def test_frozen_norms_stand_still_until_train_wakes_them():
    model = Tuned()
    module = bound(model)
    for m in (model, module):
        m.train()
    cm.freeze(module, "bn")
    model.bn.eval().requires_grad_(False)
    for m in (model, module):
        torch.manual_seed(3)
        m(X).sum().backward()
    assert torch.equal(module.bn.running_mean, torch.zeros(4))
    assert module.bn.weight.grad is None
    assert torch.allclose(module.fc1.weight.grad, model.fc1.weight.grad, atol=1e-6)
    module.train()
    module(X)
    assert module.bn.num_batches_tracked == 1
    assert not module.bn.weight.requires_grad


def test_a_module_stands_for_all_below_it():
    module = bound(ConvNet(), IMAGE)
    report = cm.freeze(module, "block1")
    assert report.norms == ("block1.bn",)
    assert report.parameters == ("block1.conv.weight", "block1.conv.bias", "block1.bn.weight", "block1.bn.bias")
    assert module.block1.drop.training


def test_instance_norms_and_two_programs():
    module = bound(Norms(), torch.randn(3, 4, 5))
    assert cm.freeze(module, "*").norms == ("tracking", "instance")
    two = cm.export(Auxiliary(), (IMAGE,))
    report = cm.freeze(two, "*")
    assert report.trainable == 0
    assert report.norms
    assert not any(two.get_submodule(name).training for name in report.norms)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ("bm", r"CM253: the pattern 'bm' matches no module or parameter\n.*\n.*did you mean 'bn'"),
        (("bn", "nothing.*"), "CM253: the pattern 'nothing"),
        ((), "CM266"),
        (None, "CM252"),
    ],
)
def test_what_can_not_be_frozen(patterns, says):
    module = bound(Tuned())
    with pytest.raises(cm.CompileModesError, match=says):
        cm.freeze(module, patterns)
    assert all(p.requires_grad for p in module.parameters())
    assert module.bn.training


def test_a_norm_without_a_flag_is_refused():
    program = torch.export.export(Tuned(), (X,))
    module = cm.bind(program, keep=("bn",))
    with pytest.raises(cm.TuningError, match="CM267: the norm 'bn'"):
        cm.freeze(module, "*")
    assert module.stem.weight.requires_grad
    with pytest.raises(cm.BindError, match="CM201"):
        cm.freeze(Tuned(), "*")


class Shared(nn.Module):
    """One norm used twice, one without a gradient, one under autocast, one without statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3, affine=False)
        self.none, self.cast = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
        self.instance, self.drop = nn.InstanceNorm2d(3, track_running_stats=True), nn.Dropout(0.3)

    def forward(self, x):
        x = self.one(self.one(self.conv(x)) * 2)
        with torch.no_grad():
            y = self.two(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.cast(self.conv(x))
        return self.drop(self.none(x) + y + z) + self.instance(x)


BATCHES = [(torch.randn(4, 3, 8, 8) * (k + 1) + k, k) for k in range(3)]


@pytest.mark.parametrize("train", [True, False], ids=["train-export", "eval-export"])
def test_statistics_are_those_of_torchs_update_bn(train):
    model = Shared()
    module = bound(model, BATCHES[0][0], train=train)
    module.train()
    module.two.eval()
    modes, code = [m.training for m in module.modules()], module.code
    torch.manual_seed(5)
    torch.optim.swa_utils.update_bn(BATCHES, model)
    torch.manual_seed(5)
    assert cm.update_bn(BATCHES, module, device="cpu") == ["one", "two", "cast"]
    ours, theirs = module.state_dict(), model.state_dict()
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())
    assert (ours["one.num_batches_tracked"], ours["cast.num_batches_tracked"]) == (6, 3)
    assert ([m.training for m in module.modules()], module.code) == (modes, code)
    for m in (module.train(), model.train()):  # momentum is what it was
        torch.manual_seed(6)
        m(BATCHES[0][0])
    assert torch.allclose(module.one.running_mean, model.one.running_mean, atol=1e-6)


def test_statistics_inside_an_eager_module_and_of_compiled_ones(no_inductor):
    model = nn.Sequential(nn.BatchNorm2d(3), Shared())
    module = nn.Sequential(copy.deepcopy(model[0]), torch.compile(bound(model[1], BATCHES[0][0]), backend="pt2e_modes"))
    torch.manual_seed(5)
    torch.optim.swa_utils.update_bn(BATCHES, model)
    torch.manual_seed(5)
    assert cm.update_bn(BATCHES, module) == ["0", "1.one", "1.two", "1.cast"]
    ours = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in model.state_dict().items())


def test_statistics_of_two_programs_and_of_none():
    two = cm.export(Auxiliary(), (IMAGE,))
    model = Auxiliary()
    model.load_state_dict(two.state_dict())
    torch.manual_seed(5)
    torch.optim.swa_utils.update_bn([IMAGE], model)
    torch.manual_seed(5)
    assert cm.update_bn([IMAGE], two)
    ours = two.state_dict()
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in model.state_dict().items())
    assert cm.update_bn([X], bound(nn.Linear(8, 2))) == []


def test_a_loader_that_raises_changes_nothing():
    module = bound(Shared(), BATCHES[0][0])
    module(BATCHES[0][0])
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def loader():
        yield BATCHES[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cm.update_bn(loader(), module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.lock = open(__file__)  # noqa: SIM115
    with pytest.raises(cm.TuningError, match="CM276"):
        cm.update_bn(BATCHES, module)
    module.lock.close()
