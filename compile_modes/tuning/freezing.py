"""``freeze``: parameters that don't train and norms that stay in eval, by globs of their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes.graph.finding import find, graph_roots
from compile_modes.graph.requests import owner_matches
from compile_modes.graph.view import View
from compile_modes.tuning.patterns import globs, matched

_NORMS = {"batch_norm", "instance_norm"}


@dataclass(frozen=True)
class FreezeReport:
    """What :func:`freeze` has matched.

    Attributes:
        parameters: names of the parameters that don't require gradients any more.
        norms: names of the modules with running statistics that are in eval.
        elements: how many numbers these parameters hold.
        trainable: how many numbers still train.
    """

    parameters: tuple[str, ...]
    norms: tuple[str, ...]
    elements: int
    trainable: int

    def __str__(self) -> str:
        lines = [f"{len(self.parameters)} parameters ({self.elements:,} elements) frozen, {self.trainable:,} train"]
        lines += [f"  {name}" for name in self.parameters]
        lines += [f"{len(self.norms)} norms in eval", *(f"  {name}" for name in self.norms)]
        return "\n".join(lines)


def freeze(bound: Any, patterns: str | Sequence[str]) -> FreezeReport:
    """Freezes parts of a bound module, in place: parameters get no gradients, norms with running statistics go to eval.

    A glob that matches the name of a module stands for all below it; it may also match single parameters
    (``"*.bias"``). Dropouts stay as they are.

    Modes are nn.Module's: a later ``train()`` of the whole module wakes its norms, as it does in eager PyTorch, and
    there is no second record of modes that could contradict the flags. So call this after each ``train()``, which
    costs next to nothing; ``requires_grad`` stays in any case.

    >>> model.train()
    >>> print(cm.freeze(model, "layer1*"))
    2 parameters (...) frozen, ... train
    ...

    Args:
        bound: a module that :func:`compile_modes.bind`, :func:`compile_modes.export` or :func:`compile_modes.load` has
            made, or an OptimizedModule around it.
        patterns: globs of names of modules and parameters.

    Returns:
        What was matched; printed, a line each.

    Raises:
        TuningError: a pattern matches nothing, or a norm's mode is a literal in the graph that this can't change.
            Nothing has been changed then.
        OptionError: ``patterns`` are no globs.
        BindError: ``bound`` holds no graph.
    """
    module: nn.Module = getattr(bound, "_orig_mod", bound)
    wanted = globs(patterns, "patterns")
    if not wanted:
        raise messages.NOTHING_TO_FREEZE.error()
    sites = [s for r in graph_roots(module) for s in find(View(r)) if s.op.family in _NORMS and s.op.stats]
    sites = [site for site in sites if not site.modeless]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    matched(wanted, [*names, *parameters], "patterns", "module or parameter")
    frozen = [name for name in parameters if _covered(name, wanted)]
    held = [site for site in sites if _covered(site.owner, wanted)]
    if stuck := [site for site in held if not site.bound and site.training is not False]:
        raise messages.NORM_NOT_BOUND.error(norm=stuck[0].owner, where=str(stuck[0]))
    for name in frozen:
        parameters[name].requires_grad_(False)
    norms = tuple(dict.fromkeys(site.owner for site in held))
    for name in norms:
        module.get_submodule(name).training = False
    unique = {id(parameters[name]): parameters[name].numel() for name in frozen}
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return FreezeReport(tuple(frozen), norms, sum(unique.values()), trainable)


def _covered(name: str, patterns: Sequence[str]) -> bool:
    """Whether a glob matches a name or one of those that it begins with."""
    parts = name.split(".")
    heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(owner_matches(head, pattern) for head in heads for pattern in patterns)
