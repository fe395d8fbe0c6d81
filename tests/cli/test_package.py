"""``package`` and ``inspect`` on the command line, with libraries that run in Python."""

import json

import pytest
import torch
import torch.nn.functional as F

import compile_modes as cm
from compile_modes._compat import aoti
from nets import VECTORS
from package import fake_aoti

MODES = ("--mode", "train", "--mode", "eval", "--mode", "mc:*drop*=train")


@pytest.fixture
def faked(tmp_path, monkeypatch):
    monkeypatch.setattr(aoti, "compile_ahead", fake_aoti.compile_ahead(tmp_path))
    monkeypatch.setattr(aoti, "Library", fake_aoti.Library)


def first_mean(outputs, target):
    """A loss, which the command line finds by its name."""
    return F.mse_loss(outputs, target)


LOSS = (f"--loss={__name__}:first_mean", "--target=float32:6,4")


@pytest.mark.every(2)
@pytest.mark.parametrize("file", ["train.pt2", "flags.pt2"])
def test_files_of_either_writer_are_packaged(file, run, faked, tmp_path):
    target = tmp_path / "packed.pt2"
    example = cm.load(file) if file == "flags.pt2" else torch.export.load(file).module()
    sizes = ",".join(map(str, example(VECTORS).shape))
    status, out, err = run("package", file, "-o", str(target), *LOSS[:1], f"--target=float32:{sizes}")
    assert (status, out, err) == (0, f"{target}: train, eval\n", "")
    packed = cm.load_package(target)
    loss, outputs = packed.train()(VECTORS, torch.zeros_like(example(VECTORS)))
    torch.testing.assert_close(loss.detach(), outputs.square().mean())
    status, out, err = run("inspect", str(target))
    assert (status, err) == (0, "")
    assert "mode train (starts in it)" in out
    assert "gradients: " in out
    said = json.loads(run("inspect", str(target), "--json")[1])
    assert set(said["modes"]) == {"train", "eval"}
    assert {weight["name"] for weight in said["weights"]} == set(packed.state_dict())
    status, _, err = run("package", file, "-o", str(target), *LOSS)
    assert status == 2
    assert "CM913" in err


def test_what_cannot_be_packaged_is_said_in_one_line(run, faked, tmp_path):
    target = str(tmp_path / "packed.pt2")
    for arguments, code in (
        (("package", "train.pt2", "-o", target), "CM014"),
        (("package", "train.pt2", "-o", target, "--loss=nowhere:loss"), "CM915"),
        (("package", "train.pt2", "-o", target, "--mode=mc:nothing=train"), "CM1"),
        (("inspect", "train.pt2"), "CM512"),
        (("inspect", "flags.pt2"), "CM030"),
        (("inspect", "none.pt2"), "CM504"),
        (("explain", "packed.pt2"), "CM504"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), arguments
        assert f"error: {code}" in err
        assert "Traceback" not in err
    for wrong in ("--mode=mc:drop", "--target=int63:8", "--target=int64:x"):
        assert run("package", "train.pt2", "-o", target, wrong)[0] == 2
