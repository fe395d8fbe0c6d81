"""Tests for a machine with a GPU; they need no more than torch, pytest and, for whole models, their libraries.

``COMPILE_MODES_TEST_DEVICE=cpu`` runs those that don't need one on the CPU, to try the tests themselves.
"""

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = os.environ.get("COMPILE_MODES_TEST_DEVICE", "cuda")


@pytest.fixture
def device() -> str:
    """Where models and inputs go."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return DEVICE


@pytest.fixture
def gpu(device: str) -> str:
    """As ``device``, for tests that make no sense elsewhere."""
    if device != "cuda":
        pytest.skip("about CUDA itself")
    return device


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """tf32 rounds to 10 bits, differently in each kernel; and cudnn may choose another convolution on every call."""
    switches = [
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cudnn, "deterministic", True),
    ]
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    yield
    for (owner, name, _), value in zip(switches, before, strict=True):
        setattr(owner, name, value)
