"""Random modules whose Python decides: every form of them equals eager, module by module, or says that it doesn't."""

import copy
import io
import warnings

import pytest
import torch

import compile_modes as cm
from compile_modes.graph.dual import DualModule
from exported.random_writers import X, build
from exported.vectors import agree_here, agree_in_modes, random_modes, set_modes
from setups import compile_

SEEDS = [*range(10), 17, 20, 42, 48, 133, 166, *(pytest.param(s, marks=pytest.mark.slow) for s in range(200, 400))]


def fails_in_eager(reference):
    """Some write to what they have read: eager's own backward raises."""
    try:
        agree_in_modes(copy.deepcopy(reference), copy.deepcopy(reference), X, random_modes(reference, 3))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.every(6)
def test_random_modules_equal_eager(seed):
    reference = build(seed)
    if fails_in_eager(reference):
        pytest.skip("eager itself fails")
    module = cm.export(copy.deepcopy(reference), (X,))
    assert isinstance(agree_in_modes(reference, module, X, random_modes(reference, 6, seed)), int)


def copied(module, modes):
    return copy.deepcopy(module)


def loaded(module, modes):
    file = io.BytesIO()
    cm.save(module, file)
    file.seek(0)
    return cm.load(file)


def baked(module, modes):
    """The program in which all modes are literals; of two programs, that of the root's mode."""
    set_modes(module, modes)
    return cm.bake(module.program(module.training) if isinstance(module, DualModule) else module)


def exported_again(module, modes):
    set_modes(module, modes)
    return torch.export.export(module, (X,)).module()


def compiled(module, modes):
    return torch.compile(copy.deepcopy(module), backend="eager")


def compiled_by_the_backend(module, modes):
    return compile_(copy.deepcopy(module))


FORMS = [loaded, copied, baked, exported_again, compiled, compiled_by_the_backend]
LITERAL = (baked, exported_again)  # they hold one combination of modes


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.every(40)
@pytest.mark.usefixtures("no_inductor")
def test_forms_of_random_modules_equal_eager(seed):
    reference = build(seed)
    if fails_in_eager(reference):
        pytest.skip("eager itself fails")
    check_form(reference, cm.export(copy.deepcopy(reference), (X,)), FORMS[seed % len(FORMS)], seed)


def check_form(reference, module, form, seed):
    vectors = random_modes(reference, 3, seed)
    if form not in LITERAL:
        again = form(module, {})
        return agree_in_modes(reference, getattr(again, "_orig_mod", again), X, vectors, call=again)
    warned = 0
    for modes in vectors:
        with warnings.catch_warnings():
            warnings.simplefilter("error", cm.ModeWarning)
            try:
                again = form(copy.deepcopy(module), modes)
            except cm.ModeWarning:
                warned += 1
                continue
        set_modes(reference, modes)
        agree_here(copy.deepcopy(reference), again, X, modes)
    return warned
