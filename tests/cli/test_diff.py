"""``diff``, and the pages of ``explain`` and ``diff``, on the command line."""

import json

import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


@pytest.fixture(scope="module")
def changed(files):
    """A file like train.pt2 with one weight and one mode of its own."""
    module = cm.bind(torch.export.load(files / "train.pt2"))
    module.drop.eval()
    with torch.no_grad():
        module.bn.weight[0] += 0.25
    cm.save(module, files / "changed.pt2")


def test_diff_exits_as_diff_does(run, changed):
    assert_expected_inline(
        run("diff", "train.pt2", "train.pt2")[1],
        """\
train.pt2 -> train.pt2
2 pairs of sites and 5 of weights: nothing differs
""",
    )
    assert run("diff", "train.pt2", "train.pt2")[0] == 0
    status, out, err = run("diff", "train.pt2", "changed.pt2")
    assert (status, err) == (1, "")
    assert_expected_inline(
        out,
        """\
train.pt2 -> changed.pt2
2 pairs of sites and 5 of weights: 2 sites changed, 1 weight changed

sites    op                       owner  what differs
changed  aten.batch_norm.default  bn     held by: literal -> flag
changed  aten.dropout.default     drop   mode: train -> eval, held by: literal -> flag

weights  name       what differs
changed  bn.weight  off by up to 0.25 in 1 element
""",
    )
    status, out, err = run("diff", "train.pt2", "none.pt2")
    assert (status, out) == (2, "")
    assert "error: CM504: there is no such file\n  where: none.pt2" in err
    assert run("diff", "train.pt2")[0] == 2


def test_diff_for_machines_and_as_a_page(run, files, changed):
    status, out, err = run("diff", "train.pt2", "changed.pt2", "--json", "--html", "diff.html")
    report = json.loads(out)
    assert (status, err) == (1, "diff.html\n")
    assert list(report) == [
        "format", "names", "differ", "counts", "programs", "sites", "weights", "compared", "left_out"
    ]  # fmt: skip
    assert report["names"] == ["train.pt2", "changed.pt2"]
    assert report["weights"][0]["largest"] == 0.25
    page = (files / "diff.html").read_text("utf-8")
    assert "train.pt2 → changed.pt2" in page
    assert "bn.weight" in page


def test_explain_writes_a_page_and_replaces_none_unless_forced(run, files):
    status, out, err = run("explain", "train.pt2", "--html", "modes.html", "--mode", "eval", "--graph")
    assert (status, err) == (0, "modes.html\n")
    assert "2 sites: 1 batch_norm, 1 dropout" in out
    page = (files / "modes.html").read_text("utf-8")
    for said in (
        "Modes: train.pt2",
        "shown in eval mode",
        "written by torch.export.save(), and bound here",
        "aten.batch_norm.default(x",
    ):
        assert said in page
    status, out, err = run("explain", "train.pt2", "--html", "modes.html")
    assert (status, out) == (2, "")
    assert "CM913: the file exists" in err
    assert run("diff", "train.pt2", "train.pt2", "--html", "modes.html")[0] == 2
    assert (files / "modes.html").read_text("utf-8") == page
    assert run("explain", "train.pt2", "--html", "modes.html", "--force")[0] == 0
    assert (files / "modes.html").read_text("utf-8") != page
    assert run("explain", "attention.pt2", "--html", "no/modes.html")[0] == 2
    run("explain", "attention.pt2", "--html", "stuck.html", "--override", "=train")
    page = (files / "stuck.html").read_text("utf-8")
    assert "Asked for, and not possible" in page
    assert 'id="CM713"' in page
