"""``explain`` of the command line, and what all commands have in common: what they print and exit with."""

import json
import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

from nets import IMAGE, ConvNet, Regions

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


def shell(*argv, cwd):
    """A command line as a process of its own."""
    command = [sys.executable, "-m", "compile_modes", *argv]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_explain_shows_what_holds_each_site(run):
    assert_expected_inline(
        run("explain", "flags.pt2")[1],
        """\
flags.pt2, written by compile_modes.save()

op                                         owner   mode   held by         literals  limits
aten.dropout.default                       (root)  train  flag            p=0.1
aten.dropout.default                       (root)  train  hard-coded      p=0.2
aten.dropout.default                       (root)  eval   hard-coded      p=0.3
aten.dropout.default                       (root)  eval   flag, inverted  p=0.15
aten.dropout.default                       (root)  train  flag            p=0.25
noise                                      (root)  train  flag
aten.scaled_dot_product_attention.default  (root)  eval   flag, inverted  p=0.3
7 sites: 1 attention, 5 dropout, 1 noise
""",
    )
    assert_expected_inline(
        run("explain", "kept.pt2")[1],
        """\
kept.pt2, written by compile_modes.save()

op                    owner   mode   held by  literals  limits
aten.dropout.default  (root)  eval   kept     p=0.1
aten.dropout.default  (root)  eval   kept     p=0.2
aten.dropout.default  (root)  train  kept     p=0.3
3 sites: 3 dropout
""",
    )
    assert run("explain", "linear.pt2")[1].endswith("no mode-dependent sites\n")


def test_explain_shows_modes_and_overrides_as_asked(run):
    status, out, _ = run("explain", "flags.pt2", "--mode", "eval", "--override", "=train", "--override", "*=eval")
    assert status == 0
    assert_expected_inline(
        out,
        """\
flags.pt2, written by compile_modes.save(), eval mode, =train, *=eval

op                                         owner   mode   held by   literals  limits
aten.dropout.default                       (root)  train  override  p=0.1
aten.dropout.default                       (root)  train  override  p=0.2
aten.dropout.default                       (root)  train  override  p=0.3
aten.dropout.default                       (root)  train  override  p=0.15
aten.dropout.default                       (root)  train  override  p=0.25
noise                                      (root)  train  override
aten.scaled_dot_product_attention.default  (root)  train  override  p=0.3
7 sites: 1 attention, 5 dropout, 1 noise
""",
    )
    status, out, _ = run("explain", "two.pt2", "--mode", "eval", "--override", "net.block1.*=train")
    assert status == 0
    assert out.count("override") == 2
    assert "the program of train mode:" not in out
    assert "the program of train mode:" in run("explain", "two.pt2")[1]


def test_explain_shows_the_graph_before_and_after(run):
    assert_expected_inline(
        run("explain", "train.pt2", "--graph")[1],
        """\
train.pt2, written by torch.export.save() and bound here

op                       owner  mode   held by  literals                  limits
aten.batch_norm.default  bn     train  flag     momentum=0.03, eps=0.001
aten.dropout.default     drop   train  flag     p=0.25
2 sites: 1 batch_norm, 1 dropout

before (model):
forward(x):
    add_ = aten.add_.Tensor(bn.num_batches_tracked, 1)  # bn
    batch_norm = aten.batch_norm.default(x, ..., True, 0.03, 0.001, False)  # bn
    dropout = aten.dropout.default(batch_norm, 0.25, True)  # drop
    return (dropout,)

after (model):
forward(x):
    add_ = advance(bn.num_batches_tracked, bn.training)  # bn
    batch_norm = aten.batch_norm.default(x, ..., bn.training, 0.03, 0.001, False)  # bn
    dropout = aten.dropout.default(batch_norm, 0.25, drop.training)  # drop
    return (dropout,)
""",
    )
    _, out, _ = run("explain", "train.pt2", "--graph", "--mode", "eval", "--override", "drop=train")
    assert_expected_inline(
        out.partition("after")[2],
        """\
 (model):
forward(x):
    batch_norm = aten.batch_norm.default(x, ..., False, 0.03, 0.001, False)  # bn
    dropout = aten.dropout.default(batch_norm, 0.25, True)  # drop
    return (dropout,)
""",
    )


def test_graphs_of_regions_are_shown_below(run, files):
    torch.export.save(torch.export.export(Regions(), (IMAGE,)), files / "regions.pt2")
    after = run("explain", "regions.pt2", "--graph", "--mode", "eval")[1].partition("after")[2]
    root, *regions = after.split("\n\n")
    assert "wrap_with_set_grad_enabled(False, submod_" in root
    assert len(regions) == 2
    assert all(region.startswith("submod_") and ", False)  # " in region for region in regions)


def test_explain_for_machines(run):
    status, out, _ = run("explain", "train.pt2", "--json", "--graph", "--override", "bn=eval")
    assert status == 0
    report = json.loads(out)
    graphs = report.pop("graphs")
    assert_expected_inline(
        json.dumps(report, indent=1),
        """\
{
 "format": 1,
 "file": "train.pt2",
 "writer": "torch.export.save",
 "stored": [
  "model"
 ],
 "mode": null,
 "overrides": {
  "bn": "eval"
 },
 "difference": null,
 "programs": [
  {
   "program": null,
   "sites": [
    {
     "op": "aten.batch_norm.default",
     "family": "batch_norm",
     "owner": "bn",
     "mode": "eval",
     "held_by": "override",
     "inverted": false,
     "modeless": false,
     "literals": {
      "momentum": 0.03,
      "eps": 0.001
     },
     "limits": {},
     "codes": {}
    },
    {
     "op": "aten.dropout.default",
     "family": "dropout",
     "owner": "drop",
     "mode": "train",
     "held_by": "flag",
     "inverted": false,
     "modeless": false,
     "literals": {
      "p": 0.25
     },
     "limits": {},
     "codes": {}
    }
   ],
   "totals": {
    "batch_norm": 1,
    "dropout": 1
   },
   "remarks": []
  }
 ],
 "complaints": [],
 "refused": []
}""",
    )
    assert {when: list(texts) for when, texts in graphs.items()} == {"before": ["model"], "after": ["model"]}
    assert "(x, ..., True" in graphs["before"]["model"]
    assert "(x, ..., False" in graphs["after"]["model"]
    report = json.loads(run("explain", "two.pt2", "--json", "--graph")[1])
    assert [program["program"] for program in report["programs"]] == ["train", "eval"]
    assert report["difference"] == "the structure of the outputs"
    assert list(report["graphs"]["after"]) == ["train", "eval"]
    report = json.loads(run("explain", "attention.pt2", "--json", "--override", "=train")[1])
    assert report["programs"][0]["sites"][0]["limits"].keys() == {"train"}
    assert [refused["site"].partition(" ")[0] for refused in report["refused"]] == ["scaled_dot_product_attention"]


def test_explain_exits_with_1_only_if_asked_to(run):
    status, out, _ = run("explain", "attention.pt2")
    assert status == 0
    assert "1 sites keep their exported mode" in out
    assert run("explain", "attention.pt2", "--strict")[0] == 1
    assert run("explain", "attention.pt2", "--strict", "--mode", "train")[0] == 1
    assert run("explain", "attention.pt2", "--strict", "--mode", "eval")[0] == 0
    assert run("explain", "attention.pt2", "--strict", "--override", "=train")[0] == 1
    assert run("explain", "attention.pt2", "--strict", "--override", "drop=train")[0] == 0
    assert run("explain", "train.pt2", "--strict")[0] == 0


@pytest.mark.slow
def test_commands_as_processes(files, tmp_path):
    model = ConvNet()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    status, out, err = shell("explain", "model.pt2", "--strict", cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "7 sites: 2 batch_norm, 5 dropout" in out
    status, out, err = shell("bake", "model.pt2", "--mode", "eval", "-o", "eval.pt2", cwd=tmp_path)
    assert (status, out, err) == (0, "eval.pt2: 0 sites in train, 7 in eval, 0 the same in both\n", "")
    x = torch.randn(11, 3, 8, 8)
    assert torch.equal(torch.export.load(tmp_path / "eval.pt2").module()(x), model.eval()(x))
    status, out, err = shell("bake", "attention.pt2", "--mode", "train", "-o", str(tmp_path / "no.pt2"), cwd=files)
    assert (status, out) == (1, "")
    assert "its p is lost" in err
    status, out, err = shell("explain", "no.pt2", cwd=tmp_path)
    said = "error: CM504: there is no such file\n  where: no.pt2\n  what to do: check the path\n"
    assert (status, out, err) == (2, "", said)
    assert sorted(os.listdir(tmp_path)) == ["eval.pt2", "model.pt2"]


@pytest.mark.slow
def test_output_that_nobody_reads_to_the_end_is_no_error(files):
    command = f"{sys.executable} -m compile_modes explain two.pt2 --graph --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", cwd=files, timeout=300)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_what_the_parser_refuses(run):
    said = []
    for argv in (
        ["explain"],
        ["explain", "train.pt2", "--override", "bn"],
        ["explain", "train.pt2", "--mode", "both"],
        ["bake", "train.pt2"],
        ["explain", "train.pt2", "--override", "bm=eval"],
        ["explain", "train.pt2", "--import", "no_such_module"],
    ):
        status, out, err = run(*argv)
        assert (status, out) == (2, "")
        said.append(err[err.find("error: ") :])
    assert_expected_inline(
        "".join(said),
        """\
error: the following arguments are required: file
error: argument --override: 'bn' is not like '*.bn=eval'
error: argument --mode: invalid choice: 'both' ...
error: the following arguments are required: -o/--output
error: CM109: the pattern 'bm' matches no mode-dependent site
  where: overrides['bm']
  what to do: owners here: 'bn'
error: CM902: the module can't be imported: No module named 'no_such_module'
  where: --import no_such_module
  what to do: install it, or put its folder on PYTHONPATH
""",
    )


@pytest.mark.slow
def test_a_module_that_registers_operators_can_be_imported_first(tmp_path):
    (tmp_path / "ops.py").write_text(
        "import torch\n"
        "@torch.library.custom_op('cmtest::twice', mutates_args=())\n"
        "def twice(x: torch.Tensor) -> torch.Tensor: return x * 2\n"
        "@twice.register_fake\n"
        "def _(x): return torch.empty_like(x)\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x): return torch.nn.functional.dropout(twice(x), 0.2, self.training)\n"
        "if __name__ == '__main__':\n"
        "    torch.export.save(torch.export.export(Net(), (torch.randn(3),)), 'model.pt2')\n"
    )
    subprocess.run([sys.executable, "ops.py"], check=True, cwd=tmp_path, timeout=300)
    status, _, err = shell("explain", "model.pt2", cwd=tmp_path)
    assert status == 2
    assert "Traceback" not in err
    assert "--import" in err
    status, out, _ = shell("bake", "model.pt2", "--import", "ops", "--mode", "eval", "-o", "eval.pt2", cwd=tmp_path)
    assert (status, out) == (0, "eval.pt2: 0 sites in train, 1 in eval, 0 the same in both\n")


def test_help_says_exit_statuses_and_keys(run):
    for command, word in (("explain", "held_by"), ("bake", "nothing is written")):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert "exit status:" in out
        assert word in out
    report = json.loads(run("explain", "train.pt2", "--json", "--graph")[1])
    text = run("explain", "--help")[1]
    assert all(key in text for key in (*report, *report["programs"][0], *report["programs"][0]["sites"][0]))
