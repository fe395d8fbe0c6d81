"""Packages that several tests share; the slow ones are compiled once for all processes of pytest-xdist."""

import os
import time

import pytest
import torch

import compile_modes as cm
from compile_modes._compat import aoti
from package import fake_aoti
from package.packages import BATCH, Cnn, Small, cross_entropy, images, squares

MODES = {"train": "train", "eval": "eval", "mc": {"*": "eval", "drop": "train"}}


def write_cnn(path, p=0.0, **options):
    """Packages a CNN of known weights."""
    torch.manual_seed(0)
    model = Cnn(p)
    image, target = images(8)
    options = {"dynamic_shapes": ({0: BATCH},), "loss": cross_entropy, "targets": (target,), **options}
    cm.package(model, (image,), path, **options)
    return model


def write_small(path, p=0.5, **options):
    """Packages what goes wrong by hand."""
    torch.manual_seed(0)
    model = Small(p)
    x = torch.randn(6, 4)
    shapes = {"dynamic_shapes": ({0: BATCH},), "loss": squares, "targets": (x,), "modes": MODES}
    cm.package(model, (x,), path, **{**shapes, **options})
    return model


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """AOTInductor replaced, for tests that need no compiled code."""
    monkeypatch.setattr(aoti, "compile_ahead", fake_aoti.compile_ahead(tmp_path))
    monkeypatch.setattr(aoti, "Library", fake_aoti.Library)


@pytest.fixture(scope="package")
def fake_file(tmp_path_factory):
    """A package of :class:`Cnn` with libraries that run in Python; to be read with ``faked``."""
    folder = tmp_path_factory.mktemp("fake")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti, "compile_ahead", fake_aoti.compile_ahead(folder))
        write_cnn(folder / "cnn.pt2", modes=MODES)
    return folder / "cnn.pt2"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Gives the path of a package, which the first process that asks for it compiles."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def get(name, write, *args, **options):
        path, lock = folder / f"{name}.pt2", folder / f"{name}.lock"
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            deadline = time.monotonic() + 300
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.2)
        else:
            write(path, *args, **options)
        return path

    return get
