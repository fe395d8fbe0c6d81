"""The cases of background_cases.py, in a process that has run no other tests.

A child shares the cache of a process whose settings and imports it can have too. What hundreds of other tests leave
in a process, such as modules that no one else can import, is not a user's.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("background_cases.py")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_cases(which):
    command = [sys.executable, "-m", "pytest", str(CASES), "-n0", "-q", "-m", which]
    done = subprocess.run(
        command, cwd=CASES.parents[2], capture_output=True, encoding="utf-8", timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
