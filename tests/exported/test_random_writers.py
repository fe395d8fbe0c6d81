"""Random modules whose Python decides: every form of them equals eager, module by module, or says that it doesn't."""

import copy
import io

import pytest

import compile_modes as cm
from exported.random_writers import X, build
from exported.vectors import agree_in_modes, random_modes

SEEDS = [
    *range(10),
    17,
    20,
    42,
    48,
    133,
    166,
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(200, 400)),
]


def fails_in_eager(reference):
    """Some write to what they have read: eager's own backward raises."""
    try:
        agree_in_modes(copy.deepcopy(reference), copy.deepcopy(reference), X, random_modes(reference, 3))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.every(3)
def test_random_modules_equal_eager(seed):
    reference = build(seed)
    if fails_in_eager(reference):
        pytest.skip("eager itself fails")
    module = cm.export(copy.deepcopy(reference), (X,))
    assert isinstance(agree_in_modes(reference, module, X, random_modes(reference, 6, seed)), int)


@pytest.mark.parametrize("seed", [0, 2, 4, 9, 20, *(pytest.param(s, marks=pytest.mark.slow) for s in range(21, 60))])
@pytest.mark.every(2)
def test_copies_and_reloads_of_random_modules_equal_eager(seed):
    reference = build(seed)
    if fails_in_eager(reference):
        pytest.skip("eager itself fails")
    module, file = cm.export(copy.deepcopy(reference), (X,)), io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    for again in (copy.deepcopy(module), cm.load(file)):
        agree_in_modes(copy.deepcopy(reference), again, X, random_modes(reference, 4, seed))
