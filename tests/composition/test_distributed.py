"""DDP, FSDP2 and pipelines on two processes that talk over the loopback interface, against the same of eager models."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
TOLERANCE = 1e-5
# The graphs per process: two modes, or, with FSDP2's hooks around each block, two modes of each piece between them.
DEFAULT = {
    "compiled-ddp bound in three buckets with an override": 2,
    "fsdp eager, root": 2,
}
SLOW = {
    "ddp-of-compiled bound": 2,
    "ddp-of-compiled eager": 2,
    "compiled-ddp bound": 2,
    "compiled-ddp eager": 2,
    "compiled-ddp eager in three buckets with an override": 2,
    "ddp-of-compiled bound, Inductor": 2,
    "fsdp eager, blocks": None,
    "fsdp eager, blocks, in place": None,
    "fsdp bound, root": 2,
    "fsdp unflattened, blocks": None,
    "pipeline stages bound": 2,
}
SLOW_ALONE = ["fsdp bound, blocks", "fsdp unbound, blocks, stock", "sync-batch-norm"]


def launch(names, folder):
    """Runs the scenarios one after the other in one pair of processes."""
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    file = folder / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    process = subprocess.Popen(
        [*command, str(WORKER), str(file), *names], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its session is its own: torchrun and both workers
        output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    return launch(DEFAULT, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    return launch([*SLOW, *SLOW_ALONE], tmp_path_factory.mktemp("slow"))


def check(ranks, graphs):
    for found in ranks:
        assert "error" not in found, found["error"]
        for what in ("output", "gradient", "state"):
            assert found[what] < TOLERANCE, (what, found)
        assert graphs is None or found["graphs"] == graphs


@pytest.mark.slow  # two processes that import torch anew
@pytest.mark.parametrize("name", DEFAULT)
def test_trains_and_evaluates_as_eager(name, default_run):
    check(default_run[name], DEFAULT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_that_trains_and_evaluates_as_eager(name, slow_run):
    check(slow_run[name], SLOW[name])


@pytest.mark.slow
def test_blocks_of_a_flat_export_are_never_called_so_fsdp_cannot_gather_them(slow_run):
    """An exported module runs its ops itself. Stock torch fails on it likewise; unflattened, it has blocks to call."""
    for ours, stock in zip(slow_run["fsdp bound, blocks"], slow_run["fsdp unbound, blocks, stock"], strict=True):
        for found in (ours, stock):
            assert "mixed torch.Tensor and DTensor" in found["error"]


@pytest.mark.slow
def test_sync_batch_norm_is_no_worse_than_stock(slow_run):
    for found in slow_run["sync-batch-norm"]:
        assert found["compile_modes"] == found["stock"]
        assert found["compile_modes"] == pytest.approx(found["eager"])
        assert found["eager"][0].startswith("ValueError: SyncBatchNorm expected input tensor to be on")
