"""The adapters of a module as a state of their own: what is saved beside a base program, and loaded onto it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.graph.owners import join
from compile_modes.graph.view import View
from compile_modes.tuning.editing import tunable
from compile_modes.tuning.layers import LORA_A, LORA_B, adapters
from compile_modes.tuning.patterns import globs, matched, near

_PEFT = "base_model.model."  # what the keys of PEFT's adapter files begin with


def lora_state_dict(bound: Any, *, modules_to_save: str | Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The adapters' entries of ``state_dict()``, which ``torch.save`` and safetensors take.

    With ``"base_model.model."`` in front, the keys are those of PEFT's adapter files.

    Args:
        bound: a module with adapters, or an OptimizedModule around it.
        modules_to_save: globs of further modules whose parameters and buffers to include, a new head's say.

    Returns:
        Tensors by name; they share the memory of the parameters.

    Raises:
        TuningError: there are no adapters, or a pattern matches no module.
    """
    root = tunable(bound, "lora_state_dict")
    patterns = globs(modules_to_save, "modules_to_save")
    homes = {join(name, part) for a in adapters(View(root)) for name in a.layer.names for part in (LORA_A, LORA_B)}
    if not homes:
        raise messages.NO_ADAPTERS.error(what="lora_state_dict")
    state = root.state_dict()
    modules = [name for name, _ in root.named_modules() if any(key.startswith(f"{name}.") for key in state) and name]
    homes |= set(matched(patterns, modules, "modules_to_save", "module with a state"))
    return {key: value for key, value in state.items() if any(key.startswith(f"{home}.") for home in homes)}


def load_lora(bound: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Copies adapters into those of a module, which were made by :func:`lora` with the same targets and r.

    Args:
        bound: the module, or an OptimizedModule around it.
        state: what :func:`lora_state_dict` gave, or what a file of it holds; PEFT's keys are taken as well.

    Raises:
        TuningError: an adapter of the module isn't in ``state``, an entry belongs to nothing here, or a shape differs.
            Nothing has been changed then.
    """
    root = tunable(bound, "load_lora")
    present = root.state_dict()
    needed = list(lora_state_dict(bound))
    given = {key.removeprefix(_PEFT): value for key, value in state.items()}
    if missing := [key for key in needed if key not in given]:
        raise messages.LACKS_ADAPTERS.error(names=few(map(repr, missing)))
    for key, value in given.items():
        if key not in present:
            raise messages.FOREIGN_ADAPTER.error(name=key, near=near(key, present))
        if value.shape != present[key].shape:
            said = {"given": tuple(value.shape), "here": tuple(present[key].shape)}
            raise messages.OTHER_SHAPE.error(**said, name=key)
    with torch.no_grad():
        for key, value in given.items():
            present[key].copy_(value)
