"""examples/cpp is built and run, and computes what eager does."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compile_modes as cm

pytestmark = pytest.mark.slow
EXAMPLE = Path(cm.__file__).parents[1] / "examples/cpp"


@pytest.fixture(scope="module")
def example():
    """The script that makes the package."""
    spec = importlib.util.spec_from_file_location("make", EXAMPLE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_program_in_c_trains_and_evaluates_as_eager_does(example, tmp_path):
    compilers = [shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    cmake = shutil.which("cmake")
    if cmake is None or not any(compilers):
        pytest.skip(f"needs {'cmake' if cmake is None else 'a C++ compiler'}")
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in ([cmake, "-S", str(EXAMPLE), "-B", str(build), prefix], [cmake, "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    example.main(tmp_path)
    program = [str(build / "train_and_evaluate"), *(str(tmp_path / n) for n in ("model.pt2", "batches.pt", "out.pt"))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, env={**os.environ, "PATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step ") == 20

    found = dict(torch.load(tmp_path / "out.pt", weights_only=True))
    model, (inputs, targets) = example.model(), torch.load(tmp_path / "batches.pt", weights_only=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, evaluated = [], []
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            evaluated.append(model.eval()(x))
    torch.testing.assert_close(found.pop("losses"), torch.stack(losses), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pop("evaluated"), torch.stack(evaluated), atol=1e-5, rtol=1e-5)
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    packed = cm.load_package(tmp_path / "model.pt2").eval()
    packed.load_state_dict(found)
    torch.testing.assert_close(packed(inputs[0]), model(inputs[0]), atol=1e-5, rtol=1e-5)
