"""The demo runs through, and would fail if the compiled module and its twin disagreed."""

import math
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from compile_modes.__main__ import main

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from compile_modes.cli import demo


@pytest.mark.slow
def test_the_demo_agrees_with_its_twin_and_compiles_each_mode_vector_once():
    command = [sys.executable, "-m", "compile_modes", "demo", "--epochs", "4"]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Warning" not in run.stderr, run.stderr
    assert "graphs compiled: 3, mode vectors used: 3: ok" in run.stdout
    assert "batches tracked: block1.bn 92, block2.bn 46" in run.stdout  # block2.bn stood still for half of the epochs
    assert len(re.findall("frozen +[│|]", run.stdout)) == 2
    assert "the compiled module trained like its eager twin" in run.stdout


def _run(model: torch.nn.Module) -> demo._Run:
    run = demo._Run(model)
    run.losses, run.outputs = {"epoch 1": torch.ones(3)}, {"epoch 1": torch.ones(3, 10)}
    return run


def _result(differences: dict[str, float], *, graphs: int = 3) -> demo.Result:
    return demo.Result([], differences, mode_vectors=3, graphs=graphs, batches_tracked={})


def _off_by(distance: float, tensor: torch.Tensor) -> torch.Tensor:
    off = tensor.clone()
    off.view(-1)[-1] += distance  # one element of many, or the only one
    return off


@pytest.mark.parametrize("what", demo.COMPARED)
def test_each_compared_tensor_decides_the_verdict(what):
    ours = _run(demo.Digits())
    twin = _run(deepcopy(ours.model))
    assert demo.differences(ours.trace(), twin.trace()) == dict.fromkeys(demo.COMPARED, 0.0)
    assert _result(demo.differences(ours.trace(), twin.trace())).ok
    trace = twin.trace()
    for name, tensor in trace[what].items():
        distance = 1 if not tensor.is_floating_point() else 2 * demo.TOLERANCE
        perturbed = {**trace, what: {**trace[what], name: _off_by(distance, tensor)}}
        differences = demo.differences(ours.trace(), perturbed)
        assert differences == {**dict.fromkeys(demo.COMPARED, 0.0), what: pytest.approx(distance, rel=1e-3)}, name
        assert not _result(differences).ok, name


def test_the_trace_holds_the_whole_state():
    model = demo.Digits()
    names = [name for what in demo.COMPARED[2:] for name in _run(model).trace()[what]]
    assert sorted(names) == sorted(model.state_dict())


def test_nan_a_missing_tensor_and_a_wrong_number_of_graphs_are_no_agreement():
    trace = _run(demo.Digits()).trace()
    same = demo.differences(trace, trace)
    nan = {**trace, "test outputs": {"epoch 1": torch.tensor([[1.0, math.nan, 1.0]])}}
    fewer = {**trace, "parameters": dict(list(trace["parameters"].items())[1:])}
    assert not _result(demo.differences(nan, trace | {"test outputs": {"epoch 1": torch.ones(1, 3)}})).ok
    assert demo.differences(fewer, trace)["parameters"] == math.inf
    assert not _result({}).ok
    assert not _result(same, graphs=4).ok
    assert _result(same).ok


@pytest.mark.parametrize(("off", "status", "line"), [(0.0, 0, "like its eager twin"), (1.0, 1, "FAILED")])
def test_the_verdict_is_the_exit_status(monkeypatch, capsys, off, status, line):
    result = _result(dict.fromkeys(demo.COMPARED, 0.0) | {"parameters": off})
    monkeypatch.setattr(demo, "train", lambda *args: result)
    assert main(["demo", "--epochs", "1"]) == status
    printed = capsys.readouterr().out
    assert line in printed
    assert ("DISAGREES" in printed) is bool(status)


@pytest.mark.parametrize(("module", "named"), [("rich.console", "rich"), ("sklearn.datasets", "scikit-learn")])
def test_without_the_extra_the_message_names_it(monkeypatch, capsys, module, named):
    monkeypatch.delitem(sys.modules, "compile_modes.cli.demo")
    monkeypatch.delattr("compile_modes.cli.demo")
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f'the demo needs {named}: pip install "compile_modes[demo]"\n'


def test_without_a_command_it_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out
