"""Values trained since export, which a file holds instead of those of the programs."""

import copy
import os

import pytest
import torch
from torch import nn

import compile_modes as cm
from archive.kinds import assert_same, both, tensors, zoo
from compile_modes.archive import programs as archive
from nets import IMAGE, ConvNet


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt2"


def test_state_replaces_values_and_leaves_the_programs_alone(path):
    programs = both(ConvNet(), IMAGE)
    held = {mode: dict(tensors(program)) for mode, program in programs.items()}
    before = copy.deepcopy(held["train"])
    trained = ConvNet()
    trained(IMAGE)
    archive.write(path, programs, {}, state=trained.state_dict())
    for mode, program in programs.items():
        for name, tensor in tensors(program).items():
            assert tensor is held[mode][name]
            assert torch.equal(tensor, before[name])
    loaded, _ = archive.read(path)
    for program in loaded.values():
        for name, value in trained.state_dict(keep_vars=True).items():
            assert_same(value, program.state_dict[name])
    assert torch.equal(loaded["eval"].module()(IMAGE), trained.eval()(IMAGE))


@pytest.mark.slow
def test_state_in_place_or_of_all_kinds(path):
    model, programs = zoo()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {"table": torch.full((4,), 9.0), "scalar": torch.tensor(-3.0), "slice": torch.ones(4)}
    state |= {
        "conj": torch.ones(4, dtype=torch.complex64).conj(),
        "expanded": torch.zeros(2, 3),
        "left": torch.zeros(5),
    }
    state |= {"right": torch.tensor([0.0, 0.0, 4.0, float("nan"), 5.0])}
    state["bits"] = torch.cat([state["left"], state["right"][2:]]).view(torch.int32)
    archive.write(path, programs, {}, state)
    loaded = tensors(archive.read(path)[0]["eval"])
    for name, value in state.items():
        close = torch.allclose if value.is_floating_point() and value.dtype.itemsize > 1 else torch.equal
        assert close(loaded[name], value, **({"equal_nan": True} if close is torch.allclose else {})), name
        if name in model._buffers and name not in ("conj", "negative"):
            assert loaded[name].stride() == model.get_buffer(name).stride(), name
    archive.write(path, programs, {}, model.state_dict())  # the very tensors
    for name, value in tensors(archive.read(path)[0]["train"]).items():
        assert_same(tensors(programs["train"])[name], value)


def test_a_parameter_in_state_decides_on_requires_grad(path):
    program = torch.export.export(ConvNet(), (IMAGE,))
    state = {"fc.bias": nn.Parameter(torch.zeros(5), requires_grad=False), "fc.weight": torch.zeros(5, 4)}
    archive.write(path, {"train": program}, {}, state)
    loaded = archive.read(path)[0]["train"].state_dict
    assert not loaded["fc.bias"].requires_grad
    assert loaded["fc.weight"].requires_grad
    assert program.state_dict["fc.bias"].requires_grad


def test_a_parameter_in_state_decides_for_all_names_of_a_tied_weight(path):
    model, programs = zoo()
    state = dict(copy.deepcopy(model).requires_grad_(False).named_parameters())
    assert "second.weight" not in state
    archive.write(path, programs, {}, state)
    loaded = archive.read(path)[0]["train"].state_dict
    assert loaded["first.weight"] is loaded["second.weight"]
    assert not loaded["second.weight"].requires_grad
    assert programs["train"].state_dict["first.weight"].requires_grad


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"first.weight": torch.zeros(4, 4), "second.weight": torch.ones(4, 4)}, "disagree"),
        ({"first.weight": torch.zeros(4, 4), "view": torch.ones(3, 4)}, "disagree"),
        ({"expanded": torch.arange(6.0).reshape(2, 3)}, "disagree"),
        ({"first.bias": torch.zeros(5)}, r"torch.float32, torch.strided and shape \(5,\)"),
        ({"first.bias": torch.zeros(4, dtype=torch.float64)}, "torch.float64"),
        ({"first.bias": torch.zeros(4, device="meta")}, "no values"),
        ({"first.bias": [0.0] * 4}, "a list, not a tensor"),
        ({"third.bias": torch.zeros(4)}, "no program has such a value"),
        ({"lifted_tensor_0": torch.zeros(4)}, "no program has such a value"),
    ],
)
@pytest.mark.every(2)
def test_state_that_does_not_fit_is_refused(path, state, message):
    with pytest.raises(cm.ArchiveError, match=message) as error:
        archive.write(path, zoo()[1], {}, state)
    assert error.value.where.startswith("state['")
    assert os.listdir(path.parent) == []


def test_one_of_two_tied_values_is_enough(path):
    archive.write(path, zoo()[1], {}, {"second.weight": torch.ones(4, 4)})
    assert torch.equal(archive.read(path)[0]["train"].state_dict["first.weight"], torch.ones(4, 4))
