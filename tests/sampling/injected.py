"""Random numbers that are recorded in one run, and given out again in others."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _draws(func):
    return torch.Tag.nondeterministic_seeded in func.tags


def _name(func):
    """The name of what draws, which is in place for one call, and need not be for many."""
    return func._overloadpacket.__name__.rstrip("_")


class Recorded(TorchDispatchMode):
    """Records what each op draws: one entry per call, for all repetitions, which come first."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _draws(func):
            self.drawn.append((func, result.clone()))
        return result


class Replayed(TorchDispatchMode):
    """Gives one repetition the numbers that it had."""

    def __init__(self, drawn, repetition):
        super().__init__()
        self.left, self.repetition = list(drawn), repetition

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if _draws(func):
            recorded, values = self.left.pop(0)
            assert _name(recorded) == _name(func)
            result.copy_(values[self.repetition].reshape(result.shape))
        return result
