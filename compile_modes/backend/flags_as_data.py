"""The option ``modes="data"``: which flags a graph takes as an input, so that Dynamo need not guard on them.

A guard may go where the flag decides nothing else than what dropouts of this very graph do. Dynamo knows a flag as a
Python value only, and what Python did with it leaves no trace, so that this is settled by who can have read it:

- ``forward`` of torch's own dropout modules, which hands the flag to the one call of a dropout that it makes;
- the code of a bound graph, where each use of a flag is a node.

Any other code that Dynamo has traced and that reads ``training`` keeps the guards of whatever it may have read.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from compile_modes import logs, messages
from compile_modes._compat import flag_guards, frames, kept
from compile_modes.backend.overrides import switched
from compile_modes.backend.owners import Names
from compile_modes.errors import few
from compile_modes.forms.data import Inputs, why_no_data
from compile_modes.graph.finding import find
from compile_modes.graph.flags import Cell, is_flag
from compile_modes.graph.followed import followed_by_autograd
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View, attribute

_CUT = "it is in a block without gradients, and eval hands its input on, with the gradient"
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_CELL = Cell.training.fget.__code__  # type: ignore[attr-defined]
_FORWARDS = {kind.forward.__code__ for kind in _DROPOUTS}


@dataclass
class Plan:
    """What becomes of the flags of a compilation in progress. Nothing has changed before :meth:`release`.

    Attributes:
        modules: those whose flag becomes data, in the order of the vector of flags.
        chosen: the sites that it decides, each with its position in the vector.
        sources: what Dynamo guards on now.
        kept: the other sites that have a mode, and why Dynamo goes on guarding on it.
    """

    modules: list[nn.Module] = field(default_factory=list)
    chosen: dict[Site, int] = field(default_factory=dict)
    sources: list[Any] = field(default_factory=list)
    kept: dict[Site, str] = field(default_factory=dict)

    def release(self, compiled: Callable[..., Any], inputs: Inputs) -> Callable[..., Any]:
        """Lets go of the guards, if flags are data, and gives the compiled graph its last inputs at each call."""
        if not self.chosen:
            return compiled
        flag_guards.guard_identity_instead(self.sources)
        return inputs.reading(compiled, self.modules)


def plan(captured: fx.GraphModule, found: Sequence[Site], names: Names) -> Plan:
    """Decides which flags become data.

    Args:
        captured: a captured graph of the frame that Dynamo is compiling.
        found: its sites, owners under their full names.
        names: the modules of the compilation.

    Raises:
        OptionError: an exported module holds switches.

    Warns:
        ModeWarning: sites whose mode stays guarded, by name.
    """
    if switches := switched(names):
        raise messages.SWITCH_AS_DATA.error(owners=few(sorted(map(repr, switches))))
    decided = Plan()
    modules = {site: names.modules.get(site.owner) or names.everything.get(site.owner) for site in found}
    sources: dict[int, list[Any]] = {}
    for source, module in flag_guards.flags_read():
        sources.setdefault(id(module), []).append(source)
    reads = _Reads.of(filter(None, modules.values()), bool(names.unclear)) if _is_whole(captured) else None
    cut = _cut_from_autograd(found)
    reasons = {site: _CUT if site in cut else _reason(site, module, sources, reads) for site, module in modules.items()}
    stay = {id(module) for site, module in modules.items() if reasons[site]}
    for site, owner in modules.items():
        if owner is None or id(owner) in stay:
            if not site.modeless and site.training is not None:
                decided.kept[site] = reasons[site] or "another site of its owner stays as it is"
            continue
        if owner not in decided.modules:
            decided.modules.append(owner)
            decided.sources += sources[id(owner)]
        decided.chosen[site] = decided.modules.index(owner)
    _tell(decided)
    return decided


def _cut_from_autograd(found: Sequence[Site]) -> set[Site]:
    """The sites in a block without gradients whose input has one: eval hands that input on, its gradient too."""
    views = {id(site.body.view): site.body.view for site in found}
    followed = set().union(*(followed_by_autograd(view.bodies) for view in views.values()))
    return {s for s in found if s.node not in followed and any(n in followed for n in s.node.all_input_nodes)}


def _is_whole(captured: fx.GraphModule) -> bool:
    """Whether a graph has all that Dynamo's guards stand for, and is as Python has run it."""
    parts = [graph for graph in captured.modules() if isinstance(graph, fx.GraphModule)]
    transformed = any(kept.nesting(node.target) for graph in parts for node in graph.graph.nodes)
    return flag_guards.one_graph_per_frame() and not transformed


def _reason(site: Site, owner: nn.Module | None, sources: Mapping[int, Any], reads: "_Reads | None") -> str:
    """Why a site keeps its mode; empty if it can have it as data."""
    if why := why_no_data(site):
        return why
    if reads is None:
        return "the graph is a part of what Dynamo traces, or transformed by torch.func"
    if owner is None or id(owner) not in sources or site.training is not owner.training or site.hard_coded:
        return "its mode is not the flag of its owner"
    return "" if reads.are_known(owner) else reads.elsewhere or "other code may read its flag"


@dataclass
class _Reads:
    """What the code that Dynamo has traced may do with flags, other than to hand them to dropouts.

    Attributes:
        classes: those whose methods read the flag of what they are called on.
        graphs: the exported modules whose code reads flags as its graph says.
        elsewhere: where code reads the flag of something, in words; empty if none does.
        dropouts: the forwards of dropout modules that were traced.
        in_regions: the ids of modules whose flag the regions of exported modules read.
        unclear: whether exported modules could not be told apart.
    """

    classes: set[type]
    graphs: list[fx.GraphModule]
    elsewhere: str
    dropouts: set[Any]
    in_regions: set[int]
    unclear: bool

    @classmethod
    def of(cls, modules: Iterable[nn.Module], unclear: bool) -> "_Reads":
        everything = [m for root in _roots(modules) for m in root.modules()]
        kinds = {type(module) for module in everything}
        methods: dict[Any, set[type]] = {}
        for kind in kinds:
            for base in kind.__mro__:
                for value in vars(base).values():
                    for code in _code_of(value):
                        methods.setdefault(code, set()).add(kind)
        graphs: dict[Any, list[fx.GraphModule]] = {}
        for graph in (module for module in everything if isinstance(module, fx.GraphModule)):
            graphs.setdefault(type(graph).forward.__code__, []).append(graph)
        found = cls(set(), [], "", set(), set(), unclear)
        for code in flag_guards.traced_code():
            if code in _FORWARDS:
                found.dropouts.add(code)
            elif code in graphs:
                found.graphs += graphs[code]
            elif code is _CELL:
                found.in_regions |= {id(cell.owner) for cell in everything if isinstance(cell, Cell)}
            else:
                own, other = flag_guards.touches_flag(code)
                if other or (own and code not in methods):
                    found.elsewhere = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}) may read its flag"
                elif own:
                    found.classes |= methods[code]
        return found

    def are_known(self, module: nn.Module) -> bool:
        """Whether nothing but dropouts has got the flag of a module."""
        if self.elsewhere or type(module) in self.classes or id(module) in self.in_regions:
            return False
        holders = [graph for graph in self.graphs if any(part is module for part in graph.modules())]
        if holders:  # which of several stateless ones a site belongs to may be unclear
            return not self.unclear and all(_reads_for_dropouts(graph, module) for graph in holders)
        forward = type(module).forward.__code__ if isinstance(module, _DROPOUTS) else None
        plain = "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
        return plain and forward in self.dropouts


def _code_of(value: Any) -> list[Any]:
    """The code of a method, and of what its decorators say that they wrap."""
    found = []
    while callable(value) and value not in found:
        found.append(value)
        value = getattr(value, "__wrapped__", None)
    return [function.__code__ for function in found if inspect.isfunction(function)]


def _roots(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [*frames.frame_modules(), *frames.roots_read().values(), *modules]


def _reads_for_dropouts(graph: fx.GraphModule, module: nn.Module) -> bool:
    """Whether a module's flag goes to dropouts of its own in a bound graph, to all of them, and to nothing else."""
    view = View(graph)
    own = [site for site in find(view) if attribute(graph, site.owner) is module]
    if not all(site.bound and not site.inverted and site.op.family == "dropout" for site in own):
        return False
    users = {site.node for site in own}
    for part in (part for part in graph.modules() if isinstance(part, fx.GraphModule)):
        for flag in part.graph.find_nodes(op="get_attr"):
            home = str(flag.target).rpartition(".")[0]
            if is_flag(flag) and attribute(part, home) is module and not users.issuperset(flag.users):
                return False
    return True


def _tell(decided: Plan) -> None:
    logs.forms([(site, "its mode is data") for site in decided.chosen])
    logs.forms([(site, f"its mode is guarded: {why}") for site, why in decided.kept.items()])
    if decided.kept:
        listed = [f"{site.op} (owner {site.owner!r}): {why}" for site, why in decided.kept.items()]
        messages.STAYS_GUARDED.warn_once(sites=few(list(dict.fromkeys(listed))))
