"""The module that a package is: flags, calls, gradients, weights; with libraries that run in Python."""

import concurrent.futures
import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.package.running import _apart
from package import fake_aoti
from package.packages import Cnn, cross_entropy, images


@pytest.fixture
def packed(fake_file, faked):
    return cm.load_package(fake_file)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cnn()


def test_names_modes_and_ties_are_those_of_the_model(packed, model):
    assert [name for name, _ in packed.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert packed.state_dict().keys() == model.state_dict().keys()
    assert packed.tied is packed.head.weight
    assert not packed.frozen.requires_grad
    assert packed.training
    assert isinstance(packed, cm.Packaged)
    assert str(inspect.signature(packed.forward)) == "(image, *targets)"  # trainers keep the columns that it names


def test_steps_and_flips_equal_eager(packed, model):
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (packed, model))
    for step in range(4):
        image, target = images(8 - step, step)
        for module, optimizer in ((model.train(), theirs), (packed.train(), ours)):
            optimizer.zero_grad()
            if module is model:
                outputs = model(image)
                loss = cross_entropy(outputs, target)
            else:
                found, got = packed(image, target)
            (loss if module is model else found).backward()
            optimizer.step()
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(got["logits"], outputs["logits"].detach())
        torch.testing.assert_close(packed.eval()(image), model.eval()(image))
        assert (packed.unused.weight.grad, packed.frozen.grad) == (None, None)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(packed.state_dict()[name], value)
    assert packed.bn.num_batches_tracked == 4
    model.load_state_dict(packed.state_dict())


def test_eval_writes_nothing(packed):
    before = copy.deepcopy(dict(packed.eval().state_dict()))
    packed(images(8)[0])
    assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())


def test_flags_decide_and_what_was_not_packaged_is_refused(packed):
    image, target = images(8)
    packed.mode("mc")
    assert (packed.training, packed.bn.training, packed.drop.training) == (False, False, True)
    assert set(packed(image)) == {"logits", "features", "count", "nothing"}
    packed.eval().drop.train()
    packed.conv.train()  # whose flag makes no difference
    assert packed._present().name == "mc"
    packed.bn.train()
    with pytest.raises(cm.PackageError, match=r"CM041.*bn in train.*\n.*'train', 'eval', 'mc'"):
        packed(image)
    with pytest.raises(cm.PackageError, match=r"CM040.*'deploy'.*\n.*\n.*'train', 'eval', 'mc'"):
        packed.mode("deploy")
    assert len(packed.train()(image, target)) == 2


def test_backward_scales_adds_and_happens_once(packed):
    image, target = images(8)
    packed(image, target)[0].backward()
    first = [p.grad.clone() for p in packed.parameters() if p.grad is not None]
    loss, outputs = packed(image, target)
    assert loss.requires_grad
    assert not outputs["logits"].requires_grad
    (loss * 3).backward()
    for parameter, before in zip([p for p in packed.parameters() if p.grad is not None], first, strict=True):
        torch.testing.assert_close(parameter.grad, 4 * before)
    loss = packed(image, target)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(cm.PackageError, match="CM049"):
        loss.backward()


def test_without_gradients_training_writes_its_buffers(packed):
    image, target = images(8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = packed(image, target)[0]
        assert not loss.requires_grad
    assert packed.bn.num_batches_tracked == 2


def test_parameters_that_are_frozen_later_get_none_and_frozen_ones_cannot_be_woken(packed):
    image, target = images(8)
    packed.head.requires_grad_(False)
    packed(image, target)[0].backward()
    assert packed.head.weight.grad is None
    assert packed.conv.weight.grad is not None
    packed.frozen.requires_grad_()
    with pytest.raises(cm.PackageError, match=r"CM048.*\n.*frozen"):
        packed(image, target)
    packed.frozen.requires_grad_(False)
    packed.requires_grad_(False)
    assert not packed(image, target)[0].requires_grad


def test_weights_that_are_replaced_are_noticed(packed, model):
    image = images(8)[0]
    packed.eval()
    packed(image)
    shared = fake_aoti.Library.shared
    packed(image)
    assert fake_aoti.Library.shared == shared  # nothing is handed over anew without need
    packed.conv.weight.data = torch.zeros(8, 3, 3, 3)
    model.conv.weight.data = torch.zeros(8, 3, 3, 3)
    torch.testing.assert_close(packed(image), model.eval()(image))
    packed.conv.weight = nn.Parameter(torch.ones(8, 3, 3, 3))
    model.conv.weight = nn.Parameter(torch.ones(8, 3, 3, 3))
    torch.testing.assert_close(packed(image), model(image))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    state["tied"] = state["head.weight"]
    for module in (packed, model):
        module.load_state_dict(state, assign=True)
    torch.testing.assert_close(packed(image), model(image))
    packed.load_state_dict(packed.state_dict())
    torch.testing.assert_close(packed(image), model(image))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(8, 3, 3, 3, dtype=torch.float64),
        torch.zeros(8, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.zeros(9, 3, 3, 3),
        torch.zeros(8, 3, 3, 3, device="meta"),
    ],
    ids=["dtype", "strides", "shape", "device"],
)
def test_weights_that_the_code_cannot_take_are_refused(value, packed):
    packed.eval().conv.weight = nn.Parameter(value)
    with pytest.raises(cm.PackageError, match=r"(?s)CM046.*conv\.weight"):
        packed(images(8)[0])


def test_a_transposed_view_of_the_same_memory_is_refused(packed):
    packed.eval()
    packed(images(8)[0])
    packed.conv.weight.data = packed.conv.weight.data.transpose(2, 3)
    with pytest.raises(cm.PackageError, match="CM046"):
        packed(images(8)[0])


def test_to_another_dtype_and_broken_ties_are_refused(packed):
    packed.eval().tied = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(cm.PackageError, match="CM047"):
        packed(images(8)[0])
    with pytest.raises(cm.PackageError, match="CM046"):
        packed.double()(images(8)[0]) if setattr(packed, "tied", packed.head.weight) is None else None


def test_calls_that_are_unlike_the_compiled_ones_are_refused(packed):
    image, target = images(8)
    for args, code in (
        ((image,), "CM042"),
        ((image, target, target), "CM042"),
        ((image.double(), target), "CM043"),
        ((image.to("meta"), target), "CM043"),
        ((image.to_sparse(), target), "CM043"),
        ((image[:, :2], target), "CM044"),
        ((image[0], target), "CM044"),
        ((image, target[:4]), "CM044"),
        ((image.repeat(20, 1, 1, 1), target), "CM044"),
        ((image.clone().requires_grad_(), target), "CM045"),
    ):
        with pytest.raises(cm.CompileModesError) as error:
            packed(*args)
        assert error.value.code == code
        assert packed.bn.num_batches_tracked == 0
    with pytest.raises(TypeError, match="CM042"):
        packed.eval()(image, target)


def test_inputs_of_any_layout_are_taken_and_by_name(packed, model):
    image = images(8)[0]
    expected = model.eval()(image)
    packed.eval()
    for same in (
        image.to(memory_format=torch.channels_last),
        image.repeat(1, 1, 1, 2)[..., :8],
        image.clone().requires_grad_(),
        image.flip(0).flip(0),
    ):
        torch.testing.assert_close(packed(same), expected)
    torch.testing.assert_close(packed(image=image), expected)
    with pytest.raises(cm.CallError, match="CM042"):
        packed(picture=image)
    expanded = image[:1].expand(5, -1, -1, -1)
    torch.testing.assert_close(packed(expanded), model(expanded))


def test_calls_from_threads(packed, model):
    packed.eval(), model.eval()
    batches = [images(4, seed)[0] for seed in range(16)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(packed, batches))
    for batch, outputs in zip(batches, found, strict=True):
        torch.testing.assert_close(outputs, model(batch))


def test_copies_and_pickles_are_refused(packed):
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(cm.PackageError, match="CM050"):
            make(packed)


def test_the_loss_that_a_module_returns_needs_no_function(faked, tmp_path):
    class Losing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).square().mean(), x

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    model = Losing()
    cm.package(model, (x,), tmp_path / "m.pt2", modes=["train"])
    packed = cm.load_package(tmp_path / "m.pt2")
    loss, (same, _) = packed(x)
    loss.backward()
    model(x)[0].backward()
    torch.testing.assert_close(same, loss.detach())
    torch.testing.assert_close(packed.linear.weight.grad, model.linear.weight.grad)
    with pytest.raises(cm.PackageError, match="CM041"):
        packed.eval()(x)


class Attending(nn.Module):
    """Attention after a recurrent layer, whose sizes torch fixes where it takes them apart in C++."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        values = self.gru(x)[0].unsqueeze(1)
        attended = nn.functional.scaled_dot_product_attention(values, self.head(values), values)
        return attended.squeeze(1)


@pytest.mark.slow
def test_attention_and_recurrent_layers_have_their_gradients_at_any_size(faked, tmp_path):
    torch.manual_seed(0)
    model, batch = Attending(), torch.export.Dim("batch", min=1, max=16)
    x, options = torch.randn(3, 2, 4), {"loss": lambda outputs: outputs.square().mean(), "modes": ["train"]}
    cm.package(model, (x,), tmp_path / "m.pt2", dynamic_shapes=({0: batch},), **options)
    packed = cm.load_package(tmp_path / "m.pt2")
    x = torch.randn(7, 2, 4)
    packed(x)[0].backward()
    model(x).square().mean().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_in_memory_of_their_own():
    """A library may return one tensor for several parameters, and an argument where that is the gradient."""
    argument, shared = torch.arange(4.0), torch.ones(4)
    found = _apart([shared, shared, argument, argument[1:]], [argument])
    for gradient in found:
        gradient.mul_(2)
    assert [g.tolist() for g in found] == [[2.0] * 4, [2.0] * 4, [0.0, 2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    assert argument.tolist() == [0.0, 1.0, 2.0, 3.0]


class Echo(nn.Module):
    """Returns what a library may have once only: clones of the input, and the loss among the outputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), torch.arange(12.0).view(3, 4).t()

    def forward(self, x):
        y = self.linear(x)
        return {"loss": y.square().mean(), "copy": x.clone(), "table": y[:, :3] + self.table}


@pytest.mark.slow
def test_results_are_in_memory_of_their_own_and_constants_lie_as_they_did(tmp_path):
    model, x = Echo(), torch.randn(4, 4)
    cm.package(model, (x,), tmp_path / "echo.pt2")
    packed, kept = cm.load_package(tmp_path / "echo.pt2"), x.clone()
    loss, outputs = packed.train()(x)
    loss.backward()
    model(x)["loss"].backward()
    torch.testing.assert_close(packed.linear.weight.grad, model.linear.weight.grad)
    evaluated = packed.eval()(x)
    for name, expected in model(x).items():
        torch.testing.assert_close(outputs[name], expected)
        torch.testing.assert_close(evaluated[name], expected)
    outputs["copy"].fill_(9.0)
    evaluated["copy"].fill_(9.0)
    assert torch.equal(x, kept)


class Odd(nn.Module):
    """A child called as a method of the package's, results of torch's own classes, and zeros of both signs."""

    def __init__(self):
        super().__init__()
        self.mode, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.zero, self.below = torch.tensor([0.0]), torch.tensor([-0.0])

    def forward(self, x):
        return self.head(self.mode(x)).max(1), 1 / self.zero, 1 / self.below


@pytest.fixture
def odd(faked, tmp_path):
    model = Odd()
    cm.package(model, (torch.ones(2, 4),), tmp_path / "odd.pt2", modes=["eval"])
    return model.eval(), cm.load_package(tmp_path / "odd.pt2")


def test_names_and_classes_that_torch_and_packages_have_too(odd):
    model, packed = odd
    x = torch.randn(2, 4)
    (values, indices), up, down = packed(x)
    expected = model(x)[0]
    torch.testing.assert_close((values, indices), tuple(expected))
    assert packed(x)[0].values.shape == (2,)
    assert (up.item(), down.item()) == (torch.inf, -torch.inf)


def test_a_submodule_that_is_replaced_and_a_weight_that_is_gone_are_told(odd):
    _, packed = odd
    head, x = packed.head, torch.randn(2, 4)
    packed.head = nn.Linear(4, 3)
    with pytest.raises(cm.PackageError, match=r"CM052: (?s:.)*head"):
        packed(x)
    packed.head = head
    weight = head.weight
    del head.weight
    with pytest.raises(cm.PackageError, match=r"CM053: (?s:.)*head.weight"):
        packed(x)
    head.weight = weight
    packed(x)
    head.bias = None
    with pytest.raises(cm.PackageError, match=r"CM053: (?s:.)*head.bias"):
        packed(x)
