"""The GPU benchmark runs through without a GPU, and the README quotes its last run, or says that there is none."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not part of an installed package")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


def started(name, *arguments, timeout=900):
    """What becomes of ``python -m NAME``."""
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=timeout, check=False)


def run(tmp_path, *arguments):
    path = tmp_path / "results.json"
    done = started("benchmarks.gpu", "--smoke", "--json", str(path), *arguments, timeout=1600)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert written["head"]["torch"] == torch.__version__
    return done.stdout, {r["contender"]: r for r in written["results"]}


@pytest.mark.slow
def test_what_does_not_fit_into_the_budget_is_not_run(tmp_path):
    output, results = run(tmp_path, "--budget", "1")
    assert {(r["status"], r["why"]) for r in results.values()} == {("not run", "the budget was spent")}
    assert "| tiny, float32, batch 4 | not run | not run | not run | not run | not run |" in output


@pytest.mark.slow
def test_the_whole_script_on_a_tiny_model(tmp_path, gpu):
    output, results = run(tmp_path, "--budget", "1500")
    assert results.keys() == set(gpu.CONTENDERS)
    for name, result in results.items():
        if name == "torchao" and result["why"] == "not installed":
            continue
        assert (result["status"], result["why"]) == ("ok", ""), name
        modes = {"eval"} if name == "freezing" else {"train", "eval"}
        assert {m for m, ms in result["step_ms"].items() if ms > 0} == modes
        assert {m for m, s in result["first_call_s"].items() if s > 0} == modes
        assert (result["eval_error"] < 1e-4) == (name != "torchao")  # whose flip to eval loses the eps of batch norms
        if name in ("ours", "bound", "stock"):
            assert result["compiles_per_flip"] == 0
    if results["torchao"]["status"] == "ok":
        assert results["torchao"]["compiles_per_flip"] >= 1
    row = next(line for line in output.splitlines() if line.startswith("| tiny, float32"))
    assert "not run" not in row
    assert f"{gpu.short(results['ours']['step_ms']['train'])} / " in row
    again, resumed = run(tmp_path, "--resume", "--contenders", "ours")
    assert resumed == results  # everything was there already
    assert row in again


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = started("benchmarks.gpu")
    assert done.returncode == 2
    assert "--smoke" in done.stderr


def result(gpu, contender, **values):
    return gpu.asdict(gpu.Result("resnet50", "bfloat16", contender, **values))


def test_the_table_says_what_was_measured_and_what_was_not(gpu):
    measured = {"status": "ok", "step_ms": {"train": 123.4, "eval": 45.6}, "first_call_s": {"train": 30.0, "eval": 9.0}}
    results = [
        result(gpu, "ours", **measured, flip_ms=0.25, after_flip_ms={"train": 1.25, "eval": 1.0}),
        result(gpu, "stock", status="failed", why="RuntimeError: no"),
    ]
    (row,) = [line for line in gpu.table(results).splitlines() if "resnet50" in line]
    rest, left = "not run / failed / not run", "not run"
    cells = [f"123 / {rest} / {left}", f"46 / {rest} / {left} / {left}", f"1.5 / {rest}", f"30 / {rest}"]
    assert row == f"| resnet50, bfloat16, batch 64 | {' | '.join(cells)} | 9 / {rest} / {left} |"
    assert gpu.notes(results) == ["resnet50, bfloat16, stock: failed: RuntimeError: no"]


def test_a_partial_run_keeps_what_else_was_measured(gpu):
    before = [
        result(gpu, "ours", status="ok"),
        result(gpu, "stock", status="ok"),
        result(gpu, "eager", status="failed"),
    ]
    for resume, again in ((True, []), (False, ["ours"])):
        args = gpu.argparse.Namespace(
            models=["resnet50"], dtypes=["bfloat16"], contenders=["ours", "bound"], resume=resume
        )
        statuses = {r.contender: r.status for r in gpu.planned(args, before)}
        assert statuses.pop("stock") == "ok"
        assert [name for name, status in statuses.items() if status == "not run"] == [*again, "bound"]


def test_the_readme_quotes_the_newest_run(gpu):
    text = (ROOT / "README.md").read_text()
    quoted = text.partition("<!-- benchmarks/gpu.py -->\n")[2].partition("\n<!-- end -->")[0]
    assert quoted == gpu.quote(gpu.newest())


def test_the_newest_run_is_found(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.quote(gpu.newest()) == gpu.NOT_YET
    for name, date in (("b", "2026-01-02"), ("a", "2026-03-01"), ("c", "2025-12-01")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"head": {"device": name, "date": date}, "results": []}))
    assert gpu.newest()["head"]["device"] == "a"
    assert gpu.quote(gpu.newest()).startswith("device a, date 2026-03-01:")


@pytest.mark.slow
def test_the_cost_per_node_is_measured(tmp_path):
    path = tmp_path / "costs.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.rewrite_scaling",
        "--nodes",
        "100",
        "--repeats",
        "1",
        "--json",
        str(path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text())["microseconds per node"]
    assert all(value > 0 for value in row.values())
    assert f"| {row['nodes']} |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval_speed", "refresh"])
def test_frozen_weights_are_measured(script, tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "figures.json"
    more = ["--rounds", "4", "--json", str(path), *(["--batches", "1"] if script == "eval_speed" else [])]
    done = started(f"benchmarks.{script}", "--models", "mobilenet_v2", "--size", "32", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads(path.read_text())["figures"].values()
    assert figures.get("error", 0.0) < 1e-4
    assert "| mobilenet_v2" in done.stdout


@pytest.mark.slow
def test_calls_are_measured(tmp_path):
    path = tmp_path / "figures.json"
    done = started("benchmarks.call_overhead", "--owners", "2", "--repeats", "2", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(value > 0 for value in json.loads(path.read_text())["figures"]["2"].values())
    assert "| 2 |" in done.stdout


@pytest.mark.slow
def test_all_of_them_in_a_time(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks", "--only", "call_overhead", "flips", "--minutes", "0.01"]
    done = subprocess.run(
        [*command, "--summary", str(page)], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert page.read_text().count("left out") == 2
