"""What a file keeps: values, layout, sharing and behaviour of one or two programs."""

import copy
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.export.pt2_archive._package import load_pt2

import compile_modes as cm
from archive.kinds import Zoo, assert_same, both, storage, tensors, zoo
from compile_modes.archive import programs as archive
from compile_modes.cli.files import open_file
from nets import IMAGE, ConvNet
from oracle import agrees


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt2"


def test_tensors_of_all_kinds(path):
    _, programs = zoo()
    archive.write(path, programs, {})
    loaded, _ = archive.read(path)
    for mode in programs:
        before, after = tensors(programs[mode]), tensors(loaded[mode])
        assert list(before) == list(after)
        for name in before:
            assert_same(before[name], after[name])
        x = torch.randn(3, 2, 4)[0]
        assert torch.equal(programs[mode].module()(x), loaded[mode].module()(x))
        assert loaded[mode].graph_signature == programs[mode].graph_signature
        assert torch.equal(loaded[mode].example_inputs[0][0], programs[mode].example_inputs[0][0])


def test_one_tensor_per_name_and_everything_shared_that_was(path):
    _, programs = zoo()
    archive.write(path, programs, {})
    loaded, _ = archive.read(path)
    train, evaluation = tensors(loaded["train"]), tensors(loaded["eval"])
    constants = {name for name in train if name.startswith("lifted_tensor")}
    assert constants
    assert set(train) - constants >= {"first.weight", "table", "view", "conj", "empty"}
    for name in train:
        assert (train[name] is evaluation[name]) == (name not in constants)
    assert not torch.equal(train["lifted_tensor_0"], evaluation["lifted_tensor_0"])
    assert train["first.weight"] is train["second.weight"]
    assert storage(train["view"]) == storage(train["first.weight"])
    assert storage(train["left"]) == storage(train["right"]) == storage(train["bits"])
    train["right"][0] = 7.0
    assert evaluation["left"][3] == 7.0
    assert evaluation["bits"][3] == torch.tensor(7.0).view(torch.int32)


def test_tied_weights_train_as_one(path):
    model = Zoo()
    archive.write(path, {"train": torch.export.export(model, (torch.randn(2, 4),))}, {})
    module = archive.read(path)[0]["train"].module()
    assert len(list(module.parameters())) == len(list(model.parameters()))
    x = torch.randn(2, 4)
    for one in (model, module):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1)
        one(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.get_parameter("second.weight"), model.first.weight)


def test_two_parameters_on_one_storage_stay_two(path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    archive.write(path, {"model": torch.export.export(model, (torch.randn(2, 3),))}, {})
    state = archive.read(path)[0]["model"].state_dict
    assert state["0.weight"] is not state["1.weight"]
    assert storage(state["0.weight"]) == storage(state["1.weight"])


def test_programs_of_two_models_share_nothing(path):
    models = nn.Linear(3, 3), nn.Linear(3, 3)
    programs = {name: torch.export.export(m, (torch.randn(2, 3),)) for name, m in zip("ab", models, strict=True)}
    archive.write(path, programs, {})
    loaded, _ = archive.read(path)
    for name, model in zip("ab", models, strict=True):
        assert torch.equal(loaded[name].state_dict["weight"], model.weight)


def test_bound_module_of_a_loaded_program_agrees_with_eager(path):
    reference = ConvNet()
    archive.write(path, both(copy.deepcopy(reference), IMAGE), {})
    loaded, _ = archive.read(path)
    agrees(reference.train(), cm.bind(loaded["train"]), inputs=[IMAGE], tolerance=0.0)


def test_dynamic_shapes(path):
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ConvNet(), (IMAGE,), dynamic_shapes={"x": {0: batch}})
    archive.write(path, {"train": program}, {})
    module = archive.read(path)[0]["train"].module()
    assert module(torch.randn(11, 3, 8, 8)).shape == (11, 5)
    with pytest.raises(AssertionError):
        module(torch.randn(65, 3, 8, 8))


@pytest.mark.parametrize("notes", [{}, {"format": 7, "modes": {"a.b": True}, "list": [None, 1.5, "ü"], "deep": [[{}]]}])
def test_notes_come_back_unchanged(path, notes):
    archive.write(path, {"train": torch.export.export(ConvNet(), (IMAGE,))}, notes)
    assert archive.read(path)[1] == notes


@pytest.mark.parametrize("notes", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1}}, {"a": torch.ones(1)}])
def test_notes_that_would_not_are_refused(path, notes):
    with pytest.raises(cm.ArchiveError, match="notes"):
        archive.write(path, {"train": torch.export.export(ConvNet(), (IMAGE,))}, notes)
    assert not path.exists()


# The file


def test_two_programs_take_hardly_more_room_than_one(path, tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Dropout(0.2), nn.Linear(512, 512))
    programs = both(model, torch.randn(4, 512))
    stock = tmp_path / "stock.pt2"
    torch.export.save(programs["train"], stock)
    archive.write(path, programs, {})
    assert path.stat().st_size < 1.1 * stock.stat().st_size
    with zipfile.ZipFile(path) as zipped:
        payloads = [i.file_size for i in zipped.infolist() if "weight_" in i.filename or "tensor_" in i.filename]
    assert sum(payloads) == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_torch_reads_the_file_itself(path):
    _, programs = zoo()
    notes = {"a": 1}
    archive.write(path, programs, notes)
    contents = load_pt2(path)
    for mode, program in programs.items():
        for name, tensor in tensors(contents.exported_programs[mode]).items():
            expected = tensors(program)[name].resolve_conj().resolve_neg()
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
    assert '"notes": {"a": 1}' in contents.extra_files["compile_modes.json"]


def test_torch_export_load_reads_a_program_called_model(path):
    model = ConvNet().eval()
    archive.write(path, {"model": torch.export.export(model, (IMAGE,))}, {})
    assert torch.equal(torch.export.load(path).module()(IMAGE), model(IMAGE))


@pytest.mark.parametrize("kind", ["str", "other ending", "file object", "handle"])
def test_kinds_of_files(tmp_path, kind):
    program = torch.export.export(ConvNet().eval(), (IMAGE,))
    name = str(tmp_path / ("model.bin" if kind == "other ending" else "model.pt2"))
    file = io.BytesIO() if kind == "file object" else name
    archive.write(file, {"eval": program}, {"a": 1})
    if kind == "handle":
        with open(name, "rb") as handle:
            loaded, notes = archive.read(handle)
    else:
        loaded, notes = archive.read(file)
    assert notes == {"a": 1}
    assert torch.equal(loaded["eval"].module()(IMAGE), program.module()(IMAGE))


def test_the_file_is_replaced_as_a_whole(path, tmp_path):
    program = torch.export.export(ConvNet(), (IMAGE,))
    target = tmp_path / "target.pt2"
    target.write_bytes(b"old")
    target.chmod(0o640)
    path.symlink_to(target)
    archive.write(path, {"train": program}, {})
    assert path.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert "train" in archive.read(target)[0]
    assert sorted(os.listdir(tmp_path)) == ["model.pt2", "target.pt2"]


# Loading elsewhere

READ = """
import sys, torch
{setup}
from compile_modes.archive import programs as archive
programs, notes = archive.read(sys.argv[1])
x = torch.load(sys.argv[2])
torch.manual_seed(0)
torch.save({{name: programs[name].module()(x).detach() for name in sorted(programs)}}, sys.argv[2])
"""


def read_in_new_process(path, x, setup=""):
    inputs = path.with_suffix(".in")
    torch.save(x, inputs)
    command = [sys.executable, "-c", READ.format(setup=setup), str(path), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True)
    return torch.load(inputs) if done.returncode == 0 else done.stderr


@pytest.mark.slow
def test_a_new_process_without_the_class(path):
    model = ConvNet()
    programs = both(copy.deepcopy(model), IMAGE)
    archive.write(path, programs, {})
    outputs = read_in_new_process(path, IMAGE)
    torch.manual_seed(0)
    assert torch.equal(outputs["eval"], model.eval()(IMAGE))
    assert torch.equal(outputs["train"], model.train()(IMAGE))


OPERATOR = """
import torch
from torch import Tensor
@torch.library.custom_op("archive_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2
twice.register_fake(lambda x: torch.empty_like(x))
"""


@pytest.mark.slow
def test_operators_that_the_process_does_not_know_are_named(path, tmp_path):
    (tmp_path / "operators_of_test.py").write_text(OPERATOR)
    sys.path.insert(0, str(tmp_path))
    try:
        import operators_of_test  # type: ignore[import-not-found] # noqa: F401
    finally:
        sys.path.remove(str(tmp_path))

    class Twice(nn.Module):
        def forward(self, x):
            return torch.ops.archive_test.twice(x)

    archive.write(path, {"eval": torch.export.export(Twice(), (torch.ones(2),))}, {})
    stderr = read_in_new_process(path, torch.ones(2))
    assert "ArchiveError: CM519: program 'eval' uses operators that this process doesn't know" in stderr
    assert "torch.ops.archive_test.twice.default" in stderr
    assert "what to do: import what registers them" in stderr
    setup = f"sys.path.insert(0, {str(tmp_path)!r}); import operators_of_test"
    assert torch.equal(read_in_new_process(path, torch.ones(2), setup)["eval"], torch.full((2,), 2.0))


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Add(nn.Module):
    def forward(self, pair):
        return pair.left + pair.right


def test_types_without_a_serialized_name_are_refused(path):
    @dataclass
    class Nameless:
        left: torch.Tensor
        right: torch.Tensor

    torch.export.register_dataclass(Nameless)
    program = torch.export.export(Add(), (Nameless(torch.ones(2), torch.ones(2)),))
    with pytest.raises(cm.ArchiveError, match="No registered serialization name") as error:
        archive.write(path, {"train": program}, {})
    assert error.value.where == "program 'train'"
    assert isinstance(error.value.__cause__, NotImplementedError)
    assert os.listdir(path.parent) == []


def test_example_inputs_that_need_unpickling_are_left_out(path):
    torch.export.register_dataclass(Pair, serialized_type_name="archive_test.Pair")
    pair = Pair(torch.ones(2), torch.full((2,), 3.0))
    program = torch.export.export(Add(), (pair,))
    archive.write(path, {"train": program}, {})
    with pytest.warns(cm.ModeWarning, match=r"^CM560: the example inputs of program 'train' were left out.*"):
        loaded, _ = archive.read(path)
    assert loaded["train"].example_inputs is None
    assert torch.equal(loaded["train"].module()(pair), torch.full((2,), 4.0))
    with torch.serialization.safe_globals([Pair]):
        loaded, _ = archive.read(path)
    assert torch.equal(loaded["train"].example_inputs[0][0].right, pair.right)
    cm.save(cm.bind(program), path)
    with pytest.warns(cm.ModeWarning, match="^CM560"):  # said on the command line too, which keeps back what bind says
        open_file(str(path))


class Odd(torch.Tensor):
    """A subclass that torch's archives hold pickled."""


def test_tensor_subclasses_need_leave_to_be_read(path):
    model = nn.Linear(3, 3)
    programs = both(model, torch.randn(2, 3))
    odd = nn.Parameter(torch.randn(3, 3).as_subclass(Odd))
    for program in programs.values():
        program.state_dict["weight"] = odd
    archive.write(path, programs, {})
    with pytest.raises(cm.ArchiveError, match="Odd") as error:
        archive.read(path)
    assert error.value.where == "weight"
    with torch.serialization.safe_globals([Odd]):
        loaded, _ = archive.read(path)
    weight = loaded["train"].state_dict["weight"]
    assert type(weight.data) is Odd
    assert torch.equal(weight, odd)
    assert weight is loaded["eval"].state_dict["weight"]


@pytest.mark.filterwarnings("ignore:.*(Qconv|quantiz|Quantiz).*")
def test_torchbind_objects(path):
    program = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))
    weight = torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8)
    program.constants["packed"] = torch.ops.quantized.linear_prepack(weight, None)
    archive.write(path, {"train": program, "eval": program}, {})
    loaded, _ = archive.read(path)
    packed = loaded["train"].constants["packed"]
    assert torch.equal(packed.unpack()[0].dequantize(), weight.dequantize())
    assert packed is loaded["eval"].constants["packed"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object, "a constant is a object, which could only be pickled"),
        (lambda: torch.zeros(2, device="meta"), "no values"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "can't hold a Tensor of torch.float32"),
        (lambda: torch.eye(2).as_subclass(type("Local", (torch.Tensor,), {})), r"torch.save\(\) can't write a Local"),
        (lambda: torch.empty(4, dtype=torch.int4), "can't hold a Tensor of torch.int4"),
    ],
)
def test_what_can_not_be_stored_is_named(path, value, message):
    program = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))
    program.constants["thing"] = value()
    with pytest.raises(cm.ArchiveError, match=message) as error:
        archive.write(path, {"train": program}, {})
    assert error.value.where == "thing"
    assert os.listdir(path.parent) == []
