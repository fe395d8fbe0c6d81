import subprocess
import sys
from pathlib import Path

import pytest

MAIN = Path(__file__).parents[2] / "examples" / "fine_tuning" / "main.py"


@pytest.mark.slow
def test_the_example_runs_from_a_published_program_to_onnxruntime():
    for library in ("sklearn", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    done = subprocess.run([sys.executable, str(MAIN), "--epochs", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("ok")
    assert "2 norms in eval" in done.stdout
