"""What :func:`compile_modes.bind` decides before it edits anything: which sites follow which flag, and which can't."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compile_modes.bodies import is_batch_norm
from compile_modes.errors import BindError, ModeWarning, OptionError
from compile_modes.rewrite import no_match, owner_matches
from compile_modes.sites import KEPT, Site, note, sites


@dataclass
class Plan:
    """What :func:`bind` is about to do: sites to bind, sites that can't be, sites at odds with their owner."""

    first: bool
    program: bool
    modes: dict[str, bool]
    bindable: list[Site]
    stuck: list[tuple[Site, str]]
    odd: list[Site]
    kept: set[Site]


def plan_binding(root: nn.Module, keep: Sequence[str]) -> Plan:
    found = sites(root)
    kept = _kept(found, keep)
    modes, chosen, odd = _choose([site for site in found if site not in kept])
    stuck = [(site, why) for site in chosen if (why := site.refusal(not site.training))]
    bindable = [site for site in chosen if not site.refusal(not site.training)]
    _check_names(root, {site.owner for site in bindable})
    first = bool(modes) and not any(site.bound for site in found)
    return Plan(first, any(modes.values()), modes, bindable, stuck, odd, kept)


def _kept(found: list[Site], keep: Sequence[str]) -> set[Site]:
    if not isinstance(keep, Iterable):
        raise OptionError(f"{keep!r} is not a list of owner globs", where="keep", remedy='pass keep=["head.*"]')
    if isinstance(keep, str):
        keep = (keep,)
    owners = sorted({site.owner for site in found})
    for pattern in keep:
        if not isinstance(pattern, str):
            raise OptionError(f"{pattern!r} is not an owner glob", where="keep", remedy='pass keep=["head.*"]')
        if not any(owner_matches(owner, pattern) for owner in owners):
            raise no_match(pattern, owners, "keep")
    kept = {site for site in found if any(owner_matches(site.owner, pattern) for pattern in keep)}
    return {site for site in found if not site.bound and (site in kept or note(site.node).get("mode") == KEPT)}


def _choose(found: list[Site]) -> tuple[dict[str, bool], list[Site], list[Site]]:
    """The mode of each owner, the sites to bind (all in that mode), and the ones that are at odds with it."""
    candidates = [s for s in found if s.training is not None and not s.bound and not s.hard_coded]
    modes = {site.owner: bool(site.training) for site in found if site.bound}
    votes: dict[str, list[bool]] = {}
    for site in candidates:
        if site.op.flag is not None or site.training:  # attention without dropout is the same in both modes
            votes.setdefault(site.owner, []).append(bool(site.training))
    program = _majority([vote for owner in votes.values() for vote in owner])
    for owner, own_votes in votes.items():
        modes.setdefault(owner, _majority(own_votes, program))
    chosen = [s for s in candidates if modes.setdefault(s.owner, program) is s.training]
    odd = [s for s in candidates if s not in chosen and (s.op.flag is not None or s.training)]
    # Attention whose p is 0 while its owner trains had no dropout: there is nothing to bind.
    return modes, [s for s in chosen if s.op.flag is not None or s.training or not program], odd


def _majority(votes: list[bool], tie: bool = False) -> bool:
    """The more frequent vote. Ties go to eval: the usual odd one out is F.dropout's default, ``training=True``."""
    count = Counter(votes)
    return tie if count[True] == count[False] else count[True] > count[False]


def _check_names(root: nn.Module, owners: Iterable[str]) -> None:
    for owner in owners:
        module: Any = root
        for name in owner.split(".") if owner else ():
            present = hasattr(module, name)
            if not present:
                break
            module = getattr(module, name)
            if not isinstance(module, nn.Module):
                raise BindError(
                    f"the owner's name is taken by a {type(module).__name__} of the exported module",
                    where=f"owner {owner!r}, attribute {name!r}",
                    remedy=f"rename that submodule before export, or pass keep=({owner!r},)",
                )


def warn(plan: Plan, stacklevel: int) -> None:
    """Says what will not follow ``train()`` and ``eval()``; ``stacklevel`` as for :func:`warnings.warn`."""
    _warn_stuck(plan, stacklevel + 2)
    _warn_uncounted(plan, stacklevel + 2)


def _warn_stuck(plan: Plan, stacklevel: int) -> None:
    if not plan.stuck:
        return
    lines = [f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in plan.stuck]
    remedy = f"export in {'eval' if plan.program else 'train'} mode, which keeps what they need"
    if any(site.op.decomposed for site, _ in plan.stuck):
        remedy = "bind the program before run_decompositions()"
    warnings.warn(
        f"{len(lines)} sites keep their exported mode and will not follow train() and eval():\n"
        + "\n".join(lines[:5] + ([f"  and {len(lines) - 5} more, see compile_modes.explain()"] if lines[5:] else []))
        + f"\n  what to do: {remedy}",
        ModeWarning,
        stacklevel=stacklevel,
    )


def _warn_uncounted(plan: Plan, stacklevel: int) -> None:
    """A batch norm module always has a counter; its absence from an eval program means that export has dropped it."""
    lost = [
        site.owner
        for site in plan.bindable
        if site.op.counter and site.counter is None and is_batch_norm(site.node) and not site.training
    ]
    if lost:
        warnings.warn(
            f"num_batches_tracked of {', '.join(map(repr, lost[:5]))} is not in the exported module and will not be "
            "counted (strict export in eval mode drops it).\n  what to do: bind the ExportedProgram instead",
            ModeWarning,
            stacklevel=stacklevel,
        )
