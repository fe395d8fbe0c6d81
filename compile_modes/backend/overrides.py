"""Modes that options ask for against the flags: what a trace made under other flags lacks, and what it can't give."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from compile_modes import logs, messages
from compile_modes._compat import frames
from compile_modes.backend.owners import Names
from compile_modes.errors import OverrideError, few
from compile_modes.graph.cumulative import is_cumulative
from compile_modes.graph.finding import sites
from compile_modes.graph.folding import unfold_literals
from compile_modes.graph.ops import LOST_DROPOUT
from compile_modes.graph.owners import join
from compile_modes.graph.requests import MODES, no_match, owner_matches
from compile_modes.graph.rewrite import Report, apply, assign
from compile_modes.graph.sites import Site

# Read their flag to choose between a fast path and the same computation in parts.
_SAME_IN_BOTH = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)


Refusal = Callable[[Site, bool, dict[Site, nn.Module]], str]


@dataclass(frozen=True)
class Asked:
    """What options ask of the sites of a graph.

    Attributes:
        training: the mode for all sites that no override names.
        overrides: ``{owner glob: "train" | "eval"}``.
        dropout_p: ``{owner glob: probability}`` of attention that was traced in eval.
        whole: whether the graph is all of a function, so that a pattern that matches nothing is an error; otherwise it
            may be meant for another part.
    """

    training: bool | None
    overrides: Mapping[str, str]
    dropout_p: Mapping[str, float] = field(default_factory=dict)
    whole: bool = True


def put_into_modes(
    captured: fx.GraphModule, found: Sequence[Site], names: Names, asked: Asked, refusal: Refusal
) -> "Decision":
    """Rewrites a captured graph, in place, as :func:`decide` decides from the same arguments.

    Warns:
        ModeWarning: modules are asked to be in another mode than their flag says, which Python has read.
    """
    if asked.overrides:
        names.pin()
    decision = decide(found, names, asked, refusal)
    if decision.decided:
        about = id(names.everything.get("")), asked.training, *asked.overrides.items()
        messages.DECIDED_IN_PYTHON.warn_once(*about, modules=few(decision.decided))
    logs.modes(found, decision.apply(captured))
    return decision


@dataclass
class Decision:
    """What is done to the sites of one captured graph. Nothing of the graph has changed before :meth:`apply`.

    Attributes:
        modes: the sites that are asked to be in a mode, each with that.
        decided: modules, with their class, whose mode Python has read and that are asked to be in another one.
        outside: batch norms that are woken and whose counter the graph can't reach, with the module that has it.
    """

    modes: list[tuple[Site, bool]] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)
    outside: dict[Site, nn.Module] = field(default_factory=dict)

    def apply(self, captured: fx.GraphModule) -> Report:
        """Rewrites the graph, in place."""
        report = apply(self.modes)
        unfold_literals(captured)
        captured.recompile()
        return report


def decide(found: Sequence[Site], names: Names, asked: Asked, refusal: Refusal) -> Decision:
    """Finds out what options ask of the sites of a captured graph.

    Args:
        found: the sites, owners under their full names. They learn of probabilities that the trace has lost.
        names: what is known of the modules of the compilation.
        asked: the options.
        refusal: why a site can't be put into a mode; notes batch norms whose counter stands outside of the graph.

    Raises:
        OverrideError: a pattern matches no site, or a site can't be put into the mode asked for.
    """
    training, overrides = asked.training, asked.overrides
    supply_dropout(found, asked.dropout_p, names)
    check_eager({**names.everything, **names.modules}, training, overrides)
    if asked.whole:
        overrides = check_patterns(overrides, found, names)
    else:
        check_names(overrides, names.everything)
        owners = {site.owner for site in found}
        overrides = {p: m for p, m in overrides.items() if any(owner_matches(o, p) for o in owners)}
    decision = Decision(decided=decided_by_python(found, names, training, overrides))
    decision.modes = assign(found, training, overrides)
    stuck = [(s, why) for s, mode in decision.modes if (why := refusal(s, mode, decision.outside))]
    if stuck:
        raise refused(stuck)
    return decision


def wanted(owner: str, training: bool | None, overrides: Mapping[str, str]) -> bool | None:
    """The mode that options ask for an owner: that of the first pattern that matches, else ``training``."""
    named = (MODES[mode] for pattern, mode in overrides.items() if owner_matches(owner, pattern))
    return next(named, training)


def supply_dropout(found: Iterable[Site], dropout_p: Mapping[str, float], names: Names) -> None:
    """Notes the probability of each dropout, in attention mostly, that an eval trace has lost, where it is known.

    It is what ``dropout_p`` says, ``{owner glob: probability}``, or what torch's own attention module keeps.
    """
    for site in found:
        if site.training is not False or not site.lacks_p:
            continue
        module = names.modules.get(site.owner)
        named = [p for pattern, p in dropout_p.items() if owner_matches(site.owner, pattern)]
        p = named[0] if named else module.dropout if isinstance(module, nn.MultiheadAttention) else None
        # Traced in train mode, and still without dropout. Exported modules only look alike: bind() has warned of them.
        never = module is not None and module.training and type(module) is not nn.Module and not _exported(module)
        if p:
            site.given_p = float(p)
        elif p is not None or never:
            site.modeless = True


def _exported(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule)


def check_patterns(overrides: Mapping[str, str], found: Sequence[Site], names: Names) -> dict[str, str]:
    """Raises OverrideError for patterns that no site can answer, with the reason where that is known.

    A pattern that simply matches nothing is left to :func:`compile_modes.graph.rewrite.assign`.

    Returns:
        The overrides without those that only name modules of which Python has read that mode already.
    """
    owners = {site.owner for site in found}
    left = dict(overrides)
    for pattern, mode in overrides.items():
        if any(owner_matches(owner, pattern) for owner in owners):
            continue
        read = sorted(name for name in names.read if owner_matches(name, pattern))
        if read and all(name in names.modules and names.modules[name].training is MODES[mode] for name in read):
            del left[pattern]
            continue
        unclear = {
            n for n in names.unclear for name in names.modules if _is_below(name, n) and owner_matches(name, pattern)
        }
        if unclear:
            raise messages.INDISTINCT.error(pattern=pattern, modules=", ".join(sorted(names.unclear)))
        fused = [s for s in found if s.op.inference and any(owner_matches(n, pattern) for n in _below(s.owner, names))]
        if fused:
            raise messages.PART_OF_KERNEL.error(pattern=pattern, site=fused[0])
        if read:
            raise messages.READ_IN_PYTHON.error(pattern=pattern, modules=few(read))
    return left


def check_names(overrides: Mapping[str, str], everything: Collection[str]) -> None:
    """Raises OverrideError for patterns that match no module at all, where not all sites are at hand.

    ``everything`` holds the names of all modules; if it is empty, they are not known.
    """
    for pattern in overrides if everything else ():
        if not any(owner_matches(name, pattern) for name in everything):
            raise no_match(pattern, sorted(everything), "overrides", "part of the module, let alone a")


def _below(owner: str, names: Names) -> list[str]:
    return [name for name in names.modules if _is_below(name, owner)]


def _is_below(name: str, owner: str) -> bool:
    return not owner or name.startswith(owner + ".")


def decided_by_python(
    found: Iterable[Site], names: Names, training: bool | None, overrides: Mapping[str, str]
) -> list[str]:
    """Modules, with their class, that are asked to be in another mode than their flag says, but have no site.

    What depends on their mode is Python's decision, which Dynamo has traced as the flag says.
    """
    undecided = (names.read - {site.owner for site in found}) | switched(names)
    return sorted(
        f"{name!r} ({type(module).__name__})"
        for name in undecided
        if (module := names.modules.get(name)) is not None
        and wanted(name, training, overrides) not in (None, module.training)
        and not isinstance(module, _SAME_IN_BOTH)
    )


def switched(names: Names) -> set[str]:
    """The modules by whose flag a switch of an exported module chooses; of it, Dynamo has traced one branch."""
    programs = [(name, program) for name, held in names.exported().items() for program in held]
    found = [(name, site) for name, program in programs for site in sites(program)]
    return {join(name, site.owner) if site.owner else name for name, site in found if site.op.family == "switch"}


def check_eager(modules: Mapping[str, nn.Module], training: bool | None, overrides: Mapping[str, str]) -> None:
    """Raises OverrideError for modules that Dynamo leaves to eager mode, where only their flag counts.

    These are recurrent ones, and batch norms in train whose average is cumulative: they take a number out of a tensor.
    """
    for name, module in modules.items():
        mode = wanted(name, training, overrides)
        if mode in (None, module.training):
            continue
        if isinstance(module, nn.RNNBase) and module.dropout and module.num_layers > 1 and not frames.traces_rnns():
            raise messages.EAGER_RNN.error(kind=type(module).__name__, owner=name)
        if module.training and is_cumulative(module) and not frames.traces_numbers():
            raise messages.EAGER_AVERAGE.error(kind=type(module).__name__, owner=name)


def refused(stuck: Sequence[tuple[Site, str]]) -> OverrideError:
    """The error for sites that can't be put into the mode that was asked for."""
    lost = sorted({s.owner for s, _ in stuck if s.lacks_p and (s.op is LOST_DROPOUT or not s.op.refusal)})
    first = stuck[0][0]
    example = f"{{{first.owner!r}: {'train' if first.training else 'eval'!r}}}"
    lines = [f"  {site}: {why}" for site, why in stuck]
    said = {"count": len(lines), "sites": "\n".join(lines), "example": example}
    return messages.SITES_LACK_P.error(**said, owner=lost[0]) if lost else messages.SITES_REFUSED.error(**said)
