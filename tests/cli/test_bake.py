"""``bake`` of the command line: what it writes, and when it doesn't."""

import contextlib
import os

import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm
from compile_modes.cli import files as opening
from nets import IMAGE, VECTORS, Small

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.every(2)
def test_bake_of_two_programs(run, mode, tmp_path):
    output = str(tmp_path / "baked.pt2")
    assert run("bake", "two.pt2", "--mode", mode, "-o", output)[0] == 0
    module = cm.load("two.pt2").train(mode == "train")
    torch.manual_seed(1)
    expected = module(IMAGE)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.export.load(output).module()(IMAGE), expected, rtol=0, atol=0)


def test_bake_writes_the_modes_of_the_file_if_none_is_asked_for(run, tmp_path):
    module = cm.export(Small(4), (VECTORS,)).train()
    module.bn.eval()
    cm.save(module, tmp_path / "mixed.pt2")
    status, out, _ = run("bake", str(tmp_path / "mixed.pt2"), "-o", str(tmp_path / "baked.pt2"))
    assert (status, out.partition(": ")[2]) == (0, "1 sites in train, 1 in eval, 0 the same in both\n")
    program = torch.export.load(tmp_path / "baked.pt2")
    assert [site.training for site in cm.sites(program)] == [False, True]


def test_bake_replaces_a_file_only_if_forced_and_whole(run, tmp_path, monkeypatch):
    output = tmp_path / "baked.pt2"
    output.write_text("mine")
    argv = ("bake", "train.pt2", "--mode", "eval", "-o", str(output))
    status, _, err = run(*argv)
    assert (status, output.read_text()) == (2, "mine")
    assert_expected_inline(
        err.replace(str(tmp_path), ""),
        """\
error: CM913: the file exists
  where: /baked.pt2
  what to do: name another one, or use --force
""",
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", lambda program, stream: stream.write(b"half") and 1 / 0)
        status, _, err = run(*argv, "--force")
    assert (status, output.read_text(), os.listdir(tmp_path)) == (2, "mine", ["baked.pt2"])
    assert err.startswith("error: CM534: torch can't serialize the program: ZeroDivisionError: division by zero\n")
    assert run(*argv, "--force")[0] == 0
    assert not cm.sites(torch.export.load(output))[0].training


def test_bake_into_a_full_disk_or_a_device(run, tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(opening, "replacing", lambda path: contextlib.nullcontext(Full()))
        status, _, err = run("bake", "train.pt2", "-o", str(tmp_path / "baked.pt2"))
    assert status == 2
    assert "error: CM503: the file can't be written: No space left on device" in err
    os.mkfifo(tmp_path / "pipe")
    status, _, err = run("bake", "train.pt2", "--force", "-o", str(tmp_path / "pipe"))
    assert status == 2
    assert "the path is not that of a regular file" in err
    assert run("bake", "train.pt2", "-o", "no/baked.pt2")[::2] == (
        2,
        "error: CM503: the file can't be written: No such file or directory\n  where: no/baked.pt2\n"
        "  what to do: see whether its folder is there and may be written to, and whether the disk is full\n",
    )


def test_bake_with_what_is_stuck(run, tmp_path):
    output = str(tmp_path / "baked.pt2")
    status, out, err = run("bake", "attention.pt2", "--mode", "train", "-o", output)
    assert (status, out, os.path.exists(output)) == (1, "", False)
    assert_expected_inline(
        err,
        """\
error: CM230: 1 sites keep their exported mode and will not follow train() and eval():
  scaled_dot_product_attention (owner ''): CM713: dropout_p is 0 ...
  what to do: export in train mode, which keeps what they need
nothing is written; --allow-stuck leaves that as it is
""",
    )
    status, out, err = run("bake", "attention.pt2", "--mode", "train", "-o", output, "--allow-stuck")
    assert status == 0
    assert err.startswith("warning: CM230: 1 sites keep")
    assert out.endswith("1 sites in train, 1 in eval, 0 the same in both\n")
    status, _, err = run("bake", "attention.pt2", "--override", "=train", "-o", output, "--force")
    assert status == 1
    assert_expected_inline(
        err,
        """\
error: CM140: overrides name sites that can't be put into that mode:
  scaled_dot_product_attention (aten.scaled_dot_product_attention.default, owner '', eval): CM713: dropout_p is 0 ...
  what to do: leave these sites out
nothing is written; --allow-stuck leaves that as it is
""",
    )
