"""What the backend tells those who ask: ``logging``, ``TORCH_LOGS``, and the structured trace that tlparse reads."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compile_modes import logs
from compile_modes.backend import entry as backend
from compile_modes.errors import CaptureError, ModeWarning
from nets import Recurrent, Small

X = torch.randn(3, 4)


def compile_and_run(model=None, x=X, **options):
    torch.compile(model or Small(4), backend="pt2e_modes", options=options)(x)


def logged(caplog):
    return {r.getMessage().split(":")[0]: r.getMessage() for r in caplog.records if r.name == "compile_modes"}


@pytest.mark.usefixtures("no_inductor")
class TestLogging:
    def test_graphs_and_modes_at_debug(self, caplog):
        with caplog.at_level(logging.DEBUG, "compile_modes"):
            compile_and_run(training=False)
        said = logged(caplog)
        assert "aten.dropout.default(batch_norm, 0.25, True)" in said["captured_graph"]
        assert "aten.dropout.default(batch_norm, 0.25, False)" in said["rewritten_graph"]
        assert "dropout (aten.dropout.default, owner 'drop', eval)" in said["modes"]
        assert "options: 2 changed, 0 already right, 0 refused" in said["modes"]

    def test_a_line_for_each_graph_at_info(self, caplog):
        with caplog.at_level(logging.INFO, "compile_modes"):
            compile_and_run()
            compile_and_run(overrides={"bn": "eval"})
        assert [r.getMessage() for r in caplog.records] == [
            "sites: 2 in train",
            "sites: 1 in eval, 1 in train; options changed 1",
        ]

    def test_nothing_is_put_into_words_for_nobody(self, monkeypatch, caplog):
        printed = []
        original = torch.fx.GraphModule.print_readable

        def spy(*args, **kwargs):
            printed.append(sys._getframe(1).f_globals["__name__"])
            return original(*args, **kwargs)

        monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
        monkeypatch.setattr(torch.fx.GraphModule, "print_readable", spy)
        compile_and_run()
        assert logs.__name__ not in printed
        torch._dynamo.reset()
        with caplog.at_level(logging.DEBUG, "compile_modes"):
            compile_and_run()
        assert logs.__name__ in printed

    def test_forms(self, caplog):
        with caplog.at_level(logging.DEBUG, "compile_modes"), torch._dynamo.config.patch(allow_rnn=True):
            compile_and_run(Recurrent(), torch.randn(3, 2, 4))
        said = logged(caplog)["forms"]
        assert "owner 'lstm', train): LSTM steps, layer by layer" in said
        assert "owner 'gru', train): layer by layer" in said

    def test_why_a_graph_goes_on_as_it_came(self, caplog, monkeypatch):
        def refuse(*args):
            raise CaptureError("no way", remedy="another")

        monkeypatch.setattr(backend, "capture", refuse)
        with caplog.at_level(logging.INFO, "compile_modes"), pytest.warns(ModeWarning, match="no way"):
            compile_and_run()
        assert "a graph goes to Inductor as it came: no way" in caplog.text


SCRIPT = """
import torch
from compile_modes import _compat
_compat.inductor = lambda mode, options: torch._dynamo.lookup_backend("aot_eager")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.25))
torch.compile(model, backend="pt2e_modes", options={"training": False})(torch.randn(3, 4))
"""


@pytest.mark.slow
def test_in_another_process_by_torchs_own_switches(tmp_path):
    environment = {**os.environ, "TORCH_LOGS": "+compile_modes", "TORCH_TRACE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert re.search(r"\[0/0\] modes:", run.stderr)
    assert "options: 1 changed" in run.stderr

    (trace,) = Path(tmp_path).glob("*.log")
    stages = [json.loads(line[line.index("{") :]) for line in trace.read_text().splitlines() if line.startswith("V")]
    named = [stage["artifact"]["name"] if "artifact" in stage else next(iter(stage)) for stage in stages]
    ours = ["compile_modes_captured_graph", "compile_modes_modes", "compile_modes_rewritten_graph"]
    shown = [name for name in named if name in (*ours, "dynamo_output_graph", "aot_joint_graph")]
    assert shown == ["dynamo_output_graph", *ours, "aot_joint_graph"]
