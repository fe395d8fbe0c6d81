"""The graph-to-graph rewrite: put sites into a mode, change nothing else."""

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import fx, nn

from compile_modes import _compat, counters
from compile_modes.bodies import Body, attribute, own
from compile_modes.errors import BindError, OptionError, OverrideError
from compile_modes.folding import fold
from compile_modes.sites import Reach, Site, add_note, graph_root, sites

MODES = {"train": True, "eval": False}
_RELAYING = (
    operator.getitem,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.contiguous.default,
)


@dataclass(frozen=True)
class Report:
    """What :func:`set_mode` did.

    Attributes:
        changed: sites that were put into another mode.
        unchanged: sites that were in the wanted mode before, or do the same in both.
        refused: sites that cannot be put into the wanted mode, each with the reason.
    """

    changed: tuple[Site, ...]
    unchanged: tuple[Site, ...]
    refused: tuple[tuple[Site, str], ...]

    def __str__(self) -> str:
        counts = f"{len(self.changed)} changed, {len(self.unchanged)} already right, {len(self.refused)} refused"
        return "\n".join([counts, *(f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in self.refused)])


def set_mode(graph_module: nn.Module, training: bool | None, *, overrides: Mapping[str, str] | None = None) -> Report:
    """Puts the mode-dependent sites of a pre-autograd ATen graph into a mode, in place.

    Only the argument that carries the mode changes, and the step of batch norm's ``num_batches_tracked`` comes and
    goes with it. A bound site stays bound: its owner's ``training`` is set instead. Idempotent, linear in nodes.

    Args:
        graph_module: an exported, captured, PT2E-prepared or bound graph.
        training: the mode for all sites that no override names; None leaves them as they are.
        overrides: ``{owner glob: "train" | "eval"}``; the first pattern that matches a site's owner decides.

    Raises:
        OptionError: ``training`` or an override's mode is not one.
        OverrideError: a pattern matches no site. Nothing has been changed then.
        BindError: ``graph_module`` holds no graph, or is an ExportedProgram.
    """
    overrides = check_overrides(training, overrides)
    root = editable(graph_module)
    wanted = assign(sites(root), training, overrides)
    if own(root):
        wanted = assign(sites(root), training, overrides)
    return apply(root, wanted)


def editable(module: Any) -> nn.Module:
    """:func:`graph_root` of something whose graph may be edited in place; a program hands out copies only."""
    if isinstance(module, torch.export.ExportedProgram):
        raise BindError(
            "an ExportedProgram can't be edited in place", remedy="pass the module of its module(), or bind it"
        )
    return graph_root(module)


def check_overrides(training: Any, overrides: Any, where: str = "overrides") -> dict[str, str]:
    """Validates the two arguments that ask for modes, here and as options of the backend."""
    if training is not None and not isinstance(training, bool):
        raise OptionError(f"training is {training!r}", remedy="pass True, False, or None to leave the modes alone")
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise OptionError(f"overrides is a {type(overrides).__name__}", remedy='pass {"layer4.*": "eval"}')
    for pattern, mode in overrides.items():
        if not isinstance(pattern, str):
            raise OptionError(f"{pattern!r} is not an owner glob", where=where, remedy='pass {"layer4.*": "eval"}')
        if not isinstance(mode, str) or mode not in MODES:
            raise OptionError(f"{mode!r} is not a mode", where=f"{where}[{pattern!r}]", remedy="use 'train' or 'eval'")
    return dict(overrides)


def check_probabilities(dropout_p: Any) -> dict[str, float]:
    """Validates ``{owner glob: probability}``, an argument of ``bind`` and an option of the backend."""
    if dropout_p is None:
        return {}
    if not isinstance(dropout_p, Mapping):
        raise OptionError(f"{dropout_p!r} is no mapping", where="dropout_p", remedy='pass {"layers.*.self_attn": 0.1}')
    for pattern, p in dropout_p.items():
        if not isinstance(pattern, str):
            raise OptionError(
                f"{pattern!r} is not an owner glob", where="dropout_p", remedy='pass {"*.self_attn": 0.1}'
            )
        if not isinstance(p, float | int) or not 0 <= p < 1:
            raise OptionError(
                f"{p!r} is no probability", where=f"dropout_p[{pattern!r}]", remedy="pass a number from 0 to below 1"
            )
    return dict(dropout_p)


def assign(found: Iterable[Site], training: bool | None, overrides: Mapping[str, str]) -> list[tuple[Site, bool]]:
    """The mode that each site is asked to be in; sites that nothing asks for are left out."""
    found = list(found)
    wanted = []
    for site in found:
        named = next(
            (MODES[mode] for pattern, mode in overrides.items() if owner_matches(site.owner, pattern)), training
        )
        if named is not None:
            wanted.append((site, named))
    owners = sorted({site.owner for site in found})
    for pattern in overrides:
        if not any(owner_matches(owner, pattern) for owner in owners):
            raise no_match(pattern, owners, "overrides")
    return wanted


def owner_matches(owner: str, pattern: str) -> bool:
    """Whether a glob names an owner, ``"layer4.*"`` all below ``layer4``; case matters."""
    return fnmatchcase(owner, pattern)


def no_match(pattern: str, owners: list[str], argument: str, kind: str = "mode-dependent") -> OverrideError:
    """The error for a pattern that names no owner, with the owners it may have meant."""
    near = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.4) or owners[:3]
    return OverrideError(
        f"the pattern {pattern!r} matches no {kind} site",
        where=f"{argument}[{pattern!r}]",
        remedy=f"owners here: {', '.join(repr(o) for o in near)}" if near else "this graph has no such site",
    )


def apply(
    root: nn.Module, wanted: Iterable[tuple[Site, bool]], refusal: Callable[[Site, bool], str] = Site.refusal
) -> Report:
    """Carries out :func:`assign`; ``refusal`` decides what cannot be."""
    changed, unchanged, refused = [], [], []
    for site, training in wanted:
        if site.modeless or site.training is training:
            unchanged.append(site)
        elif why := refusal(site, training):
            refused.append((site, why))
        else:
            changed.append((site, training))
    edited: set[nn.Module] = set()
    for site, training in changed:
        if site.bound:
            set_flag(root, site, training)
        else:
            edited |= write_literal(site, training)
        site.training = training
    for module in edited:
        _compat.refresh(module)
    return Report(tuple(site for site, _ in changed), tuple(unchanged), tuple(refused))


def set_flag(root: nn.Module, site: Site, training: bool) -> None:
    """Sets the flag that a bound site reads, so that the site is in the given mode."""
    value = site.read(site.op.flag or str(site.op.p))
    flag = value if site.op.flag else value.args[0]
    if site.inverted:
        flag, training = flag.args[0], not training
    holder = str(flag.target).rpartition(".")[0]
    (attribute(site.body.module, holder) if holder else site.body.module).training = training
    root.get_submodule(site.owner).training = training


def write_literal(site: Site, training: bool) -> set[nn.Module]:
    """Writes a mode into a site as a literal; returns the modules whose graphs it has edited."""
    make_one_node(site)
    if site.op.flag is not None:
        if training and site.op.p is not None and site.p != site.read(site.op.p):
            set_argument(site, site.op.p, site.p)  # supplied by someone who knows
        set_argument(site, site.op.flag, training)
    elif training and site.op.p is None:
        insert_dropout(site, float(site.p or 0.0), True)
    elif training:
        set_argument(site, str(site.op.p), site.p)
        loosen_views(site.node)
    else:
        add_note(site.node, p=site.p)  # the way back to train; the literal is the only other place that knows
        set_argument(site, str(site.op.p), 0.0)
        loosen_views(site.node)
    edited = {site.body.module}
    if site.step is not None:
        counters.set_literal(site.step, training)
        edited.add(_owner_of_graph(site, site.step))
        site.step = site.step if training else None
    elif training and site.counter_at is not None:
        site.step = insert_step(site.counter_at, True)
        edited.add(site.counter_at.body.module)
    return edited


def make_one_node(site: Site) -> None:
    """Folds the nodes of a site that is a region into one that carries its mode."""
    if site.region is not None:
        site.node, site.region = fold(site.region, site.body), None


def _owner_of_graph(site: Site, node: fx.Node) -> nn.Module:
    body: Body | None = site.body
    while body is not None and body.graph is not node.graph:
        body = body.parent
    return body.module if body is not None else site.body.module


def set_argument(site: Site, name: str, value: Any) -> None:
    """Replaces one argument of a node, found by its name in the schema.

    FX leaves trailing defaults out; an argument that is not there is added by name, and is left out again when it
    goes back to its default, so that a round trip gives the same text.
    """
    node, index = site.node, site.op.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    elif value == site.op.default(name) and not isinstance(value, fx.Node):
        node.kwargs = {key: v for key, v in node.kwargs.items() if key != name}
    else:
        node.update_kwarg(name, value)


def insert_dropout(site: Site, p: float, flag: fx.Node | bool) -> None:
    """Puts the dropout that a softmax of attention weights is followed by in train behind it."""
    graph, weights = site.node.graph, site.node
    with graph.inserting_after(max(weights, flag) if isinstance(flag, fx.Node) else weights):
        dropped = graph.call_function(torch.ops.aten.dropout.default, (weights, p, flag))
    weights.replace_all_uses_with(dropped, delete_user_cb=lambda user: user is not dropped)
    dropped.meta = {k: v for k, v in weights.meta.items() if k in ("nn_module_stack", "val", "stack_trace")}


def loosen_views(attention: fx.Node) -> None:
    """Makes views of an attention's output reshapes, in place.

    The kernel, and with it the layout of the output, depends on whether there is dropout; export has left out the
    ``contiguous()`` before a view wherever the exported kernel's layout needed none.
    """
    following = list(attention.users)
    for node in following:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
        elif node.target in _RELAYING:
            following.extend(node.users)


def insert_step(reach: Reach, flag: fx.Node | bool) -> fx.Node:
    """A new step of a counter, bound to ``flag`` or unconditional."""
    counter = reach.counter if isinstance(reach.counter, fx.Node) else attr_node(reach.body.graph, reach.counter)
    return counters.insert(reach.body.graph, reach.anchor, counter, flag)


def attr_node(graph: fx.Graph, target: str) -> fx.Node:
    """The ``get_attr`` node for an attribute; a new one, before the first computation, if there is none."""
    for node in graph.find_nodes(op="get_attr", sort=False):
        if node.target == target:
            return cast(fx.Node, node)
    # Not graph.get_attr(): it warns about attributes that are neither parameters, buffers nor modules.
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        return graph.create_node("get_attr", target)
