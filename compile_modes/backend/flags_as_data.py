"""The option ``modes="data"``: which flags a graph takes as an input, so that Dynamo need not guard on them.

A guard may go where the flag decides nothing else than what dropouts of this very graph do. Dynamo knows a flag as a
Python value only, and what Python did with it leaves no trace, so that this is settled by who can have read it:

- ``forward`` of torch's own dropout modules, which hands the flag to the one call of a dropout that it makes;
- the code of a bound graph, where each use of a flag is a node.

Any other code that Dynamo has traced and that reads ``training`` keeps the guards of whatever it may have read.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, logs, messages
from compile_modes._compat import flag_guards, frames, kept
from compile_modes.backend.overrides import switched
from compile_modes.backend.owners import Names
from compile_modes.errors import few
from compile_modes.forms.data import why_no_data
from compile_modes.graph.flags import is_flag
from compile_modes.graph.ops import lookup
from compile_modes.graph.sites import Site
from compile_modes.graph.view import attribute

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FORWARDS = {kind.forward.__code__ for kind in _DROPOUTS}
_GUARDED = "other code may read its flag"


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

    def release(self, compiled: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Lets go of the guards, and gives the compiled graph its last input: the flags, as they are at each call."""
        flag_guards.guard_identity_instead(self.sources)
        return _reading(compiled, self.modules, device)


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
    reasons = _reasons(captured, found, modules, sources)
    free = {id(m) for s, m in modules.items() if not reasons[s]} - {id(m) for s, m in modules.items() if reasons[s]}
    for site, module in modules.items():
        if module is None or id(module) not in free:
            if not site.modeless and site.training is not None:
                decided.kept[site] = reasons[site] or "another site of its owner stays as it is"
            continue
        if module not in decided.modules:
            decided.modules.append(module)
            decided.sources += sources[id(module)]
        decided.chosen[site] = decided.modules.index(module)
    _tell(decided)
    return decided


def _reasons(
    captured: fx.GraphModule,
    found: Sequence[Site],
    modules: Mapping[Site, nn.Module | None],
    sources: Mapping[int, Sequence[Any]],
) -> dict[Site, str]:
    """Why each site keeps its mode; empty for those that can have it as data."""
    parts = [graph for graph in captured.modules() if isinstance(graph, fx.GraphModule)]
    whole = flag_guards.one_graph_per_frame() and not any(
        kept.nesting(node.target) for graph in parts for node in graph.graph.nodes
    )
    reads = _Reads.of(module for module in modules.values() if module is not None) if whole else None
    reasons, device = {}, None
    for site, module in modules.items():
        reason = why_no_data(site)
        if not reason and reads is None:
            reason = "the graph is a part of what Dynamo traces, or transformed by torch.func"
        elif not reason and (module is None or id(module) not in sources or site.training is not module.training):
            reason = "its mode is not the flag of its owner"
        elif not reason and not reads.are_known(module):  # type: ignore[union-attr, arg-type]
            reason = reads.elsewhere or _GUARDED  # type: ignore[union-attr]
        if not reason:
            own = _compat.value(site.read("input")).device
            device = device or own
            reason = "" if own == device else f"it is on {own}, others on {device}"
        reasons[site] = reason
    return reasons


@dataclass
class _Reads:
    """What the code that Dynamo has traced may do with flags, other than to hand them to dropouts.

    Attributes:
        classes: those whose methods read the flag of what they are called on.
        graphs: the exported modules whose code reads flags as its graph says.
        elsewhere: where code reads the flag of something, in words; empty if none does.
        dropouts: the forwards of dropout modules that were traced.
    """

    classes: set[type]
    graphs: list[fx.GraphModule]
    elsewhere: str
    dropouts: set[Any]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "_Reads":
        everything = [m for root in _roots(modules) for m in root.modules()]
        kinds = {type(module) for module in everything}
        methods: dict[Any, set[type]] = {}
        for kind in kinds:
            for base in kind.__mro__:
                for value in vars(base).values():
                    methods.setdefault(getattr(value, "__code__", None), set()).add(kind)
        graphs = {code: m for m in everything if isinstance(m, fx.GraphModule) and (code := type(m).forward.__code__)}
        found = cls(set(), [], "", set())
        for code in flag_guards.traced_code():
            if code in _FORWARDS:
                found.dropouts.add(code)
            elif code in graphs:
                found.graphs += [
                    m for m in everything if isinstance(m, fx.GraphModule) and type(m).forward.__code__ == code
                ]
            else:
                own, other = flag_guards.touches_flag(code)
                if other or (own and code not in methods):
                    found.elsewhere = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}) may read its flag"
                elif own:
                    found.classes |= methods[code]
        return found

    def are_known(self, module: nn.Module) -> bool:
        """Whether nothing but dropouts has got the flag of a module."""
        if self.elsewhere or type(module) in self.classes:
            return False
        holders = [graph for graph in self.graphs if any(part is module for part in graph.modules())]
        if holders:
            return all(_reads_for_dropouts(graph, module) for graph in holders)
        forward = type(module).forward.__code__ if isinstance(module, _DROPOUTS) else None
        plain = "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
        return plain and forward in self.dropouts


def _roots(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [*frames.frame_modules(), *frames.roots_read().values(), *modules]


def _reads_for_dropouts(graph: fx.GraphModule, module: nn.Module) -> bool:
    """Whether each read of a module's flag in a bound graph, bodies included, goes to dropouts and nothing else."""
    for part in graph.modules():
        nodes = part.graph.nodes if isinstance(part, fx.GraphModule) else ()
        for node in nodes:
            if node.op != "get_attr" or not is_flag(node):
                continue
            owner = attribute(part, str(node.target).rpartition(".")[0]) if "." in str(node.target) else part
            if owner is module and not all(_is_dropout(user, node) for user in node.users):
                return False
    return True


def _is_dropout(user: fx.Node, flag: fx.Node) -> bool:
    row = lookup(user.target)
    return (
        row is not None
        and row.family == "dropout"
        and row.flag is not None
        and row.read(user.args, dict(user.kwargs), row.flag) is flag
        and user.all_input_nodes.count(flag) == 1
    )


def _tell(decided: Plan) -> None:
    logs.forms([(site, "its mode is data") for site in decided.chosen])
    logs.forms([(site, f"its mode is guarded: {why}") for site, why in decided.kept.items()])
    if decided.kept:
        listed = [f"{site.op} (owner {site.owner!r}): {why}" for site, why in decided.kept.items()]
        messages.STAYS_GUARDED.warn_once(sites=few(list(dict.fromkeys(listed))))


def _reading(compiled: Callable[..., Any], modules: Iterable[nn.Module], device: torch.device) -> Callable[..., Any]:
    """Calls with the flags of the modules as last argument, in a tensor that is made anew when one has changed.

    The last one is left as it is: backward passes may still need it.
    """
    references: list[Any] = [weakref.ref(module) for module in modules]  # guards keep calls of dead modules away
    last: tuple[list[bool], torch.Tensor | None] = ([], None)

    def run(*args: Any) -> Any:
        nonlocal last
        flags = [reference().training for reference in references]
        current = last
        if flags != current[0]:
            with torch.inference_mode(False):
                last = current = flags, torch.tensor(flags, dtype=torch.bool, device=device)
        return compiled(*args, current[1])

    return run
