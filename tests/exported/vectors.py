"""The oracle for modes module by module: eager and ours side by side, in random modes of all modules."""

import random
import warnings

import torch
from torch import nn

import compile_modes as cm


def set_modes(module: nn.Module, modes: dict[str, bool]) -> None:
    """Puts modules into modes as a user does, the outer ones first; names that are gone decide nothing."""
    present = dict(module.named_modules())
    for name, mode in modes.items():
        if name in present:
            present[name].train(mode)


def random_modes(reference: nn.Module, count: int, seed: int = 0) -> list[dict[str, bool]]:
    """Train, eval, and random modes of every module."""
    rng, names = random.Random(seed), [name for name, _ in reference.named_modules()]
    mixed = [{name: rng.random() < 0.5 for name in names} for _ in range(count)]
    return [dict.fromkeys(names, True), dict.fromkeys(names, False), *mixed]


def one_step(call, module: nn.Module, x: torch.Tensor, seed: int):
    torch.manual_seed(seed)
    module.zero_grad()
    y = call(x)
    if y.requires_grad:
        y.square().mean().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "rng": torch.get_rng_state(), **grads, **module.state_dict()}


def agree_in_modes(reference, module, x, modes, *, call=None, tolerance=0.0) -> int:
    """Asserts equal outputs, gradients, state and random numbers, twice in each of the modes.

    Returns:
        How many of the modes were refused with a warning; they are left out.
    """
    warned = 0
    for vector in modes:
        set_modes(reference, vector)
        with warnings.catch_warnings():
            warnings.simplefilter("error", cm.ModeWarning)
            try:
                set_modes(module, vector)
            except cm.ModeWarning:
                warned += 1
                continue
        agree_here(reference, module, x, vector, call=call, tolerance=tolerance)
    return warned


def agree_here(reference, module, x, modes, *, call=None, tolerance=0.0) -> None:
    """Asserts the same of two calls in the modes that both are in, which ``modes`` names for the message."""
    module.load_state_dict(reference.state_dict())
    for seed in range(2):
        expected = one_step(reference, reference, x, seed)
        ours = one_step(module if call is None else call, module, x, seed)
        assert expected.keys() == ours.keys()
        for name, value in expected.items():
            assert torch.allclose(value.float(), ours[name].float(), rtol=tolerance, atol=tolerance), (name, modes)
