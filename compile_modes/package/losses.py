"""What a loss holds beside what it is given: a package has no place for it, and torch.export makes constants of it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes.errors import CompileModesError, few, summary
from compile_modes.exported.provenance import set_flags
from compile_modes.graph.followed import leaves
from compile_modes.package.asking import TRAIN, Vector
from compile_modes.package.programs import Examples, Step


def check_loss(module: nn.Module, vector: Vector, examples: Examples, loss: Callable[..., Any]) -> None:
    """Computes the loss once, on a copy of a module, and looks where its gradients go.

    A closure goes on holding the module's own tensors, so that of those, too, it is seen which it uses.

    Args:
        module: the bound module.
        vector: the flags to train with.
        examples: what it is called with.
        loss: as for :func:`package`.

    Raises:
        PackageError: gradients go to a tensor that isn't a parameter of the copy, or the loss writes a buffer; or it
            can't be computed.
    """
    copied, own = copy.deepcopy(module), copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
    set_flags(copied, vector)
    buffers = dict(own.named_buffers()) if isinstance(own, nn.Module) else {}
    before = {name: buffer._version for name, buffer in buffers.items()}
    step = Step(copied, examples, own, training=True)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            result = step(*examples.tensors)[0]
    except CompileModesError:
        raise
    except Exception as error:  # whatever the model or the loss raises
        raise messages.MODE_FAILS.error(mode=TRAIN, error=summary(error)) from error
    known = set(map(id, copied.parameters()))
    held = [*_names([leaf for leaf in leaves([result]) if id(leaf) not in known], module, own)]
    held += [f"the buffer {name!r}" for name, version in before.items() if buffers[name]._version != version]
    if result.requires_grad and held:
        raise messages.HELD_BY_LOSS.error(held=few(held))


def _names(tensors: list[torch.Tensor], module: nn.Module, loss: Any) -> Iterator[str]:
    """What the tensors are called in the module or in the loss."""
    named = dict(module.named_parameters())
    named |= dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}
    names = {id(parameter): name for name, parameter in named.items()}
    for tensor in tensors:
        yield repr(names[id(tensor)]) if id(tensor) in names else f"a tensor of shape {tuple(tensor.shape)}"
