"""What a file keeps: values, layout, sharing and behaviour of one or two programs."""

import copy
import functools
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
from compile_modes.archive import programs as archive
from compile_modes.cli.files import open_file

from nets import IMAGE, ConvNet  # isort: skip
from oracle import agrees  # isort: skip

DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.bool, torch.uint8,
    torch.int8, torch.int64, torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


class Zoo(nn.Module):
    """Tensors of all kinds. Constants differ by mode, and one name is a constant in both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        buffers = {f"kind{i}": torch.randint(0, 2, (3, 2)).to(dtype) for i, dtype in enumerate(DTYPES)}
        buffers |= {"empty": torch.zeros(0, 3), "flat": torch.zeros(2, 0, dtype=torch.int32)}
        buffers |= {"slice": torch.arange(10.0)[3:7], "transposed": torch.randn(4, 3).t(), "one": torch.tensor(1.5)}
        buffers |= {"stepped": torch.randn(6, 4)[::2, 1:], "expanded": torch.randn(1, 3).expand(2, 3)}
        buffers |= {"conj": torch.randn(5, dtype=torch.complex64)[1:].conj()}
        buffers |= {"negative": torch.randn(4, dtype=torch.complex64).conj().imag}
        whole = torch.randn(8)
        buffers |= {"left": whole[:5], "right": whole[3:], "bits": whole.view(torch.int32)}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.register_buffer("view", self.first.weight.detach()[1:], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)) * self.scalar + self.frozen + self.table
        for buffer in (self.last, *self._buffers.values()):
            if buffer.dtype != torch.float8_e4m3fn:
                y = y + (buffer.real if buffer.is_complex() else buffer).double().sum().float()
        offset = torch.tensor([1.0, 2.0, 3.0, 4.0]) if self.training else torch.tensor([0.5, 0.0, 0.0, 0.0])
        return y + offset


def both(model: nn.Module, *args: torch.Tensor) -> dict[str, torch.export.ExportedProgram]:
    return {mode: torch.export.export(model.train(mode == "train"), args) for mode in ("train", "eval")}


@functools.cache
def zoo() -> tuple[Zoo, dict[str, torch.export.ExportedProgram]]:
    """For the tests that write to none of its tensors."""
    model = Zoo()
    return model, both(model, torch.randn(2, 4))


def tensors(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    return {**program.state_dict, **program.constants}


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def assert_same(before: torch.Tensor, after: torch.Tensor) -> None:
    assert torch.equal(before.float(), after.float()) if before.dtype.itemsize == 1 else torch.equal(before, after)
    for what in ("dtype", "shape", "device", "requires_grad"):
        assert getattr(before, what) == getattr(after, what), what
    assert isinstance(before, nn.Parameter) == isinstance(after, nn.Parameter)
    if not (before.is_conj() or before.is_neg()):
        assert before.stride() == after.stride()
    assert after.is_leaf
    assert not after._is_view()


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


# Values trained since export


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
def test_state_that_does_not_fit_is_refused(path, state, message):
    with pytest.raises(cm.ArchiveError, match=message) as error:
        archive.write(path, zoo()[1], {}, state)
    assert error.value.where.startswith("state['")
    assert os.listdir(path.parent) == []


def test_one_of_two_tied_values_is_enough(path):
    archive.write(path, zoo()[1], {}, {"second.weight": torch.ones(4, 4)})
    assert torch.equal(archive.read(path)[0]["train"].state_dict["first.weight"], torch.ones(4, 4))


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
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(cm.__file__)))
    return torch.load(inputs) if done.returncode == 0 else done.stderr


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
