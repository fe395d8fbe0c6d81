"""No file is written that can't be read: regions that return nothing come back, and what would not is refused."""

import io

import pytest
import torch
from torch import nn
from torch.export.pt2_archive._package import load_pt2

import compile_modes as cm
from compile_modes._compat import pt2
from compile_modes.cli.main import main
from oracle import agrees, same_state, text

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class Silent(nn.Module):
    """Writes state in a region that returns nothing; ``around`` are the contexts, the outermost first."""

    def __init__(self, *around):
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.around = around

    def forward(self, x):
        self.step(x, self.around)
        return self.drop(self.fc(x))

    def step(self, x, around):
        if around:
            with around[0]():
                self.calls.add_(1)
                self.step(x, around[1:])
        else:
            self.bn(x)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


SILENT = [
    pytest.param([torch.no_grad], id="no_grad"),
    pytest.param([autocast], id="autocast"),
    pytest.param([torch.no_grad, autocast], id="autocast-in-no_grad"),
    pytest.param([autocast, autocast], id="autocast-in-autocast"),
    pytest.param([torch.no_grad, autocast, autocast], id="three-deep"),
    pytest.param([torch.inference_mode], id="inference_mode"),
]


@pytest.mark.parametrize("around", SILENT)
@pytest.mark.every(4)
def test_a_region_that_returns_nothing_comes_back(around):
    model = Silent(*around)
    module = cm.export(model, (X,))
    file = io.BytesIO()
    cm.save(module, file)
    loaded = cm.load(file)
    same_state(module, loaded, 0.0)
    assert text(loaded) == text(module)
    reference = Silent(*around)
    reference.load_state_dict(loaded.state_dict())
    agrees(reference, loaded, inputs=[X], tolerance=0.0)
    again = io.BytesIO()
    cm.save(loaded, again)
    assert text(cm.load(again)) == text(module)


def test_a_bound_program_and_one_of_strict_export_come_back_too():
    for strict in (False, True):
        program = torch.export.export(Silent(torch.no_grad), (X,), strict=strict)
        before = {node.name: node.meta.get("val") for node in program.graph.nodes}
        file = io.BytesIO()
        cm.save(cm.bind(program, keep=["calls"]), file)
        reference = Silent(torch.no_grad)
        loaded = cm.load(file)
        reference.load_state_dict(loaded.state_dict())
        agrees(reference, loaded, inputs=[X], tolerance=0.0)
        assert {node.name: node.meta.get("val") for node in program.graph.nodes} == before, "the program was edited"


def test_torch_reads_the_programs_of_such_a_file():
    file = io.BytesIO()
    cm.save(cm.export(Silent(torch.no_grad), (X,)), file)
    file.seek(0)
    programs = load_pt2(file).exported_programs
    assert programs.keys() == {"train", "eval"}
    programs["train"].module()(X)
    assert programs["train"].state_dict["bn.num_batches_tracked"] == 1


@pytest.mark.parametrize("around", SILENT[:5])
@pytest.mark.every(4)
def test_bake_writes_a_file_that_torch_reads(around, tmp_path):
    cm.save(cm.export(Silent(*around), (X,)), tmp_path / "both.pt2")
    for mode in ("train", "eval"):
        assert main(["bake", str(tmp_path / "both.pt2"), "-o", str(tmp_path / f"{mode}.pt2"), "--mode", mode]) == 0
        torch.export.load(tmp_path / f"{mode}.pt2").module()(X)


def _unreadable(*held):
    raise ValueError("the reader gave up")


def test_what_can_not_be_read_back_is_refused_and_the_file_there_stays(tmp_path, monkeypatch, capsys):
    program = torch.export.export(Silent(torch.no_grad), (X,))
    torch.export.save(pt2.readable(program), tmp_path / "program.pt2")
    target, baked = tmp_path / "model.pt2", tmp_path / "baked.pt2"
    for file in (target, baked):
        file.write_bytes(b"what was there before")
    bound = cm.bind(program, keep=["calls"])
    monkeypatch.setattr(pt2, "program_from_bytes", _unreadable)
    with pytest.raises(cm.ArchiveError, match=r"could not read the program back.*\n.*program 'model'"):
        cm.save(bound, target)
    assert main(["bake", str(tmp_path / "program.pt2"), "-o", str(baked), "--mode", "train", "--force"]) == 2
    assert "could not read the program back" in capsys.readouterr().err
    assert target.read_bytes() == baked.read_bytes() == b"what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"program.pt2", "model.pt2", "baked.pt2"}


def test_no_weight_is_copied_to_make_sure(monkeypatch):
    module = cm.bind(torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), (X,)))
    checked = []
    read = pt2.program_from_bytes

    def watched(text, state, constants, inputs):
        checked.append(sum(tensor.numel() for tensor in (*state.values(), *constants.values())))
        return read(text, state, constants, inputs)

    monkeypatch.setattr(pt2, "program_from_bytes", watched)
    cm.save(module, io.BytesIO())
    assert checked == [0]
