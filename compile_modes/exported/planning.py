"""What :func:`compile_modes.bind` decides before it edits anything: which sites follow which flag, and which can't."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes.errors import ModeWarning, few, few_lines
from compile_modes.graph.aliases import reused
from compile_modes.graph.explain import beside, overriding
from compile_modes.graph.finding import find
from compile_modes.graph.ops import lookup
from compile_modes.graph.owners import is_batch_norm, is_observing
from compile_modes.graph.regions import regions, samplers
from compile_modes.graph.requests import check_probabilities, no_match, owner_matches
from compile_modes.graph.sites import KEPT, Site, note
from compile_modes.graph.view import View


@dataclass
class Plan:
    """What :func:`bind` is about to do.

    Attributes:
        view: the graphs.
        first: whether nothing is bound yet, so that the flags are still to be set.
        program: the mode that most of the program is in.
        modes: the mode of each owner.
        bindable: sites to bind, and ``inverted`` those of them that are in train when the flag says eval.
        stuck: sites that can't be, with the reason.
        odd: sites at odds with their owner, which keep their literal.
        kept: sites that the caller wants to keep theirs.
        overriding: classes of the model that override ``train()``, which a bound module does not call.
        gone: modules of which an eval export has nothing, except for those that ``keep`` names.
        unclear: random numbers that may or may not depend on mode.
        written: buffers of a train program that are written, and may or may not be in eval.
        counting: sites that keep their literal, but whose counter follows their owner.
        supplied: probabilities that the export has lost and the caller knows.
    """

    view: View
    first: bool
    program: bool
    modes: dict[str, bool]
    bindable: list[Site]
    stuck: list[tuple[Site, str]]
    odd: list[Site]
    kept: set[Site]
    unclear: list[fx.Node] = field(default_factory=list)
    overriding: list[str] = field(default_factory=list)
    supplied: dict[Site, float] = field(default_factory=dict)
    inverted: set[Site] = field(default_factory=set)
    counting: list[Site] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


def plan_binding(
    view: View,
    keep: Sequence[str],
    dropout_p: Mapping[str, float] | None = None,
    gone: Sequence[str] = (),
    *,
    decomposed: bool = False,
) -> Plan:
    """Decides what :func:`bind` does; raises what it raises.

    Args:
        view: the graphs.
        keep, dropout_p: as for :func:`bind`.
        gone: modules of which an eval export has nothing.
        decomposed: whether the program is, so that it can't be told by the node whose statistics a write updates.
    """
    keep = (keep,) if isinstance(keep, str) else keep
    found = find(view)
    drawn = _unclear(view)
    # Of a batch norm without a site, whose result nobody reads, the counter is here.
    writes = [(n, path) for n, path in beside(view, found) if not is_batch_norm(n) and not is_observing(n)]
    norms = _with_statistics(view) if decomposed else set()  # their writes stand at the end, with the root for owner
    written = [(path, view.owner[n]) for n, path in writes if path.rpartition(".")[0] not in norms]
    kept = _kept(
        found, keep, {*gone, *(view.owner[node] for node in drawn), *(name for names in written for name in names)}
    )
    was_inverted = {site for site in found if note(site.node).get("inverted") and not site.bound}
    modes, chosen, odd = _choose([site for site in found if site not in kept])
    supplied = _supplied(found, dropout_p)
    refused = {s: why for s in chosen if s not in supplied and (why := s.refusal(not s.training))}
    bindable = [s for s in chosen if s not in refused]
    _check_names(view.root, {site.owner for site in bindable})
    first = bool(modes) and not any(site.bound for site in found)
    fused = [f"{site.owner}.*" for site in found if site.op.inference]  # the site says what they have lost
    unclear = [n for n in drawn if any(modes.values()) and not _matches_any(view.owner[n], keep)]
    return Plan(
        view,
        first,
        any(modes.values()),
        modes,
        bindable,
        list(refused.items()),
        odd,
        kept,
        unclear,
        overriding(bindable),
        supplied,
        was_inverted & set(bindable),
        gone=[name for name in gone if not _matches_any(name, [*keep, *fused])],
        written=_unasked(written, keep) if first and any(modes.values()) else [],
    )


def _kept(found: list[Site], keep: Sequence[str], other_owners: set[str]) -> set[Site]:
    if not isinstance(keep, Iterable):
        raise messages.NOT_A_LIST.error(keep=keep)
    owners = sorted({site.owner for site in found} | other_owners)
    for pattern in keep:
        if not isinstance(pattern, str):
            raise messages.NOT_A_GLOB.error(pattern=pattern, where="keep", example='keep=["head.*"]')
        if not any(owner_matches(owner, pattern) for owner in owners):
            raise no_match(pattern, owners, "keep")
    kept = {site for site in found if _matches_any(site.owner, keep)}
    return {site for site in found if not site.bound and (site in kept or note(site.node).get("mode") == KEPT)}


def _with_statistics(view: View) -> set[str]:
    """The modules whose buffers are statistics of an op, in whatever form."""
    found = set()
    for node in view.nodes():
        row = lookup(node.target)
        if row is not None and row.stats:
            paths = (view.state[operand] for operand in node.all_input_nodes)
            found |= {path.rpartition(".")[0] for path in paths if path is not None}
    return found


def _unasked(written: list[tuple[str, str]], keep: Sequence[str]) -> list[str]:
    """The buffers that the caller has not said to be written in both modes, by their names or by their writers'."""
    said = {path for path, owner in written if _matches_any(path, keep) or _matches_any(owner, keep)}
    return sorted({path for path, _ in written} - said)


def _matches_any(owner: str, patterns: Sequence[str]) -> bool:
    return any(owner_matches(owner, pattern) for pattern in patterns)


def _unclear(view: View) -> list[fx.Node]:
    """Random numbers that are not all that their module is for: an eval export may lack them, or not."""
    found: list[fx.Node] = []
    clear: set[fx.Node] = set()
    for body in view.bodies:  # callers first
        if body.caller in clear:
            clear.update(body.graph.nodes)
        elif not body.gated:
            clear.update(node for region in regions(body) if region.covers for node in region.nodes)
            found += [n for n in samplers(body) if n not in clear and n.target not in _compat.UNCONDITIONAL_HOPS]
    return found


def _supplied(found: list[Site], dropout_p: Any) -> dict[Site, float]:
    """The sites without a probability that ``dropout_p`` gives one."""
    candidates = [site for site in found if site.op.family == "attention" or site.lacks_p]
    owners = sorted({site.owner for site in candidates})
    supplied: dict[Site, float] = {}
    for pattern, p in check_probabilities(dropout_p).items():
        named = [site for site in candidates if owner_matches(site.owner, pattern)]
        if not named:
            raise no_match(pattern, owners, "dropout_p", "attention or functional dropout")
        for site in named:
            if site.p or site.bound:
                raise messages.HAS_PROBABILITY.error(site=site, pattern=pattern)
            supplied.setdefault(site, float(p))
    return supplied


def _choose(found: list[Site]) -> tuple[dict[str, bool], list[Site], list[Site]]:
    """The mode of each owner, the sites to bind (all in that mode), and the ones that are at odds with it."""
    candidates = [s for s in found if s.training is not None and not s.bound and not s.hard_coded]
    modes = {site.owner: bool(site.training) for site in found if site.bound}
    votes: dict[str, list[bool]] = {}
    for site in candidates:
        if site.op.flag is not None or site.training:  # attention without dropout is the same in both modes
            votes.setdefault(site.owner, []).append(_flag(site))
    program = _majority([vote for owner in votes.values() for vote in owner])
    for owner, own_votes in votes.items():
        modes.setdefault(owner, _majority(own_votes, program))
    # A mask in an eval program is there in both modes.
    always = {s for s in candidates if s.region is not None and not program}
    chosen = [s for s in candidates if modes.setdefault(s.owner, program) is _flag(s) and s not in always]
    at_odds = {*candidates} - {*chosen}
    odd = [s for s in candidates if s in at_odds and (s.op.flag is not None or s.training)]
    # Attention whose p is 0 while its owner trains had no dropout: there is nothing to bind.
    return modes, [s for s in chosen if s.op.flag is not None or s.training or not program], odd


def _flag(site: Site) -> bool:
    """The flag that a literal stands for."""
    return bool(site.training) != bool(note(site.node).get("inverted"))


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
                raise messages.NAME_TAKEN.error(kind=type(module).__name__, owner=owner, name=name)


def complaints(plan: Plan) -> list[ModeWarning]:
    """What will not follow ``train()`` and ``eval()``, a warning for each reason."""
    said = (_stuck(plan), _uncounted(plan), _reused(plan), _overriding(plan), _unsaid(plan), _writing(plan))
    return [warning for warning in said if warning is not None]


def _overriding(plan: Plan) -> ModeWarning | None:
    if not plan.overriding:
        return None
    return messages.TRAIN_OVERRIDDEN.warning(classes=few(plan.overriding))


def _unsaid(plan: Plan) -> ModeWarning | None:
    if not plan.unclear:
        return None
    owners = sorted({repr(plan.view.owner[node]) for node in plan.unclear})
    return messages.RANDOM_IN_BOTH.warning(owners=few(owners))


def _writing(plan: Plan) -> ModeWarning | None:
    if not plan.written:
        return None
    return messages.WRITTEN_IN_BOTH.warning(buffers=few(map(repr, plan.written)))


def _stuck(plan: Plan) -> ModeWarning | None:
    if not plan.stuck:
        return None
    lines = [f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in plan.stuck]
    shown = few_lines(lines)
    if any(site.op.decomposed for site, _ in plan.stuck):
        return messages.STUCK_DECOMPOSED.warning(count=len(lines), sites=shown)
    return messages.STUCK.warning(count=len(lines), sites=shown, mode="eval" if plan.program else "train")


def _reused(plan: Plan) -> ModeWarning | None:
    again = [site for site in plan.bindable if reused(site)]
    if not again:
        return None
    return messages.REUSED.warning(count=len(again), sites=few(map(str, again)))


def _uncounted(plan: Plan) -> ModeWarning | None:
    """A batch norm module always has a counter; its absence from an eval program means that export has dropped it."""
    lost = [
        site.owner
        for site in plan.bindable
        if site.op.counter and site.counter is None and is_batch_norm(site.node) and not site.training
    ]
    if not lost:
        return None
    return messages.UNCOUNTED.warning(owners=few(map(repr, lost)))
