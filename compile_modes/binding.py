"""``bind`` and ``bake``: flags that a graph reads, instead of literals that it has swallowed, and back."""

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx, nn

from compile_modes import _compat, counters
from compile_modes.bodies import Body, attribute, bodies, join, module_type, own
from compile_modes.errors import BindError, ModeWarning
from compile_modes.rewrite import attr_node, insert_step, no_match, owner_matches, set_argument, write_literal
from compile_modes.sites import HARD_CODED, Site, add_note, graph_root, is_flag, sites

_CELL = "_mode_cell"
_M = TypeVar("_M", bound=nn.Module)


def bind(exported: Any, *, keep: Sequence[str] = ()) -> Any:
    """Gives an exported program working ``train()`` and ``eval()``, submodule by submodule.

    Each mode-dependent site reads its owner's ``training`` afterwards, so eager calls follow it and Dynamo guards on
    it: under ``torch.compile``, each combination of modes in use compiles once. Binding alone changes no behaviour:
    each owner's flag starts as the mode that its sites were exported in. Sites of one owner that disagree with its
    majority (``training=True`` written into the model) keep their literal; :func:`explain` lists them.

    Args:
        exported: an ExportedProgram, the GraphModule of ``ep.module()``, a PT2E-prepared GraphModule, an
            UnflattenedModule, or an OptimizedModule around one of these. Modules are bound in place; parameters,
            buffers and ``state_dict`` keys stay as they are.
        keep: globs of owners whose sites keep their literal.

    Returns:
        The bound module: ``exported`` itself, or the new module of an ExportedProgram.

    Raises:
        BindError: there is no graph, the graph is decomposed, or an owner's name is taken by another attribute.
        OverrideError: a ``keep`` pattern matches no site.

    Warns:
        ModeWarning: some sites can't follow the flag, with the reason for each.
    """
    if isinstance(exported, torch.export.ExportedProgram) and exported.dialect == "ATEN":
        raise _decomposed("an ExportedProgram in the ATEN dialect")
    root = graph_root(exported)
    if isinstance(exported, torch.export.ExportedProgram):
        _restore_state(root, exported)
    plan = _plan(root, keep)
    if own(root):
        plan = _plan(root, keep)
    for owner in {site.owner for site in plan.bindable}:
        _ensure_module(root, owner)
    if plan.first:
        for module in root.modules():
            module.training = plan.program
    for site in plan.bindable:
        root.get_submodule(site.owner).training = plan.modes[site.owner]
    for site in plan.odd:
        add_note(site.node, mode=HARD_CODED)
    edited = _bind_sites(root, plan.bindable)
    for module in [root, *(body.module for body in bodies(root))]:
        module.__dict__.pop("train", None)  # the methods by which export forbids what now works
        module.__dict__.pop("eval", None)
    for module in edited:
        _compat.refresh(module)
    _warn_stuck(plan)
    _warn_uncounted(plan)
    return root if isinstance(exported, torch.export.ExportedProgram) else exported


def bake(module: _M, training: bool | None = None) -> _M:
    """Writes the modes of a bound module back as literals, in place, for tools that want a plain graph.

    ``train()`` and ``eval()`` of the result raise, as those of ``ep.module()`` do, until it is bound again.

    Args:
        module: a bound module, or an OptimizedModule around one.
        training: the mode to write into all bound sites; None writes each owner's present one.

    Returns:
        ``module``.

    Raises:
        BindError: ``module`` has no graph, or a mode was given and no site is bound.
    """
    root = graph_root(module)
    found = sites(root)
    bound = [site for site in found if site.bound]
    if found and not bound and training is not None:
        raise BindError("no site is bound", where=type(root).__name__, remedy="use set_mode() on an unbound graph")
    edited: set[nn.Module] = set()
    for site in bound:
        mode = site.training if training is None else training
        if site.op.flag is None:  # the literal probability, before write_literal decides what stays of it
            set_argument(site, str(site.op.p), site.p)
            site.bound = False
        edited |= write_literal(site, bool(mode))
    for body in bodies(root):
        _drop_flags(body)
    for submodule in list(root.modules()):
        for name in [name for name in submodule._modules if name.startswith(_CELL)]:
            delattr(submodule, name)
    for edited_module in edited:
        _compat.refresh(edited_module)
    if bound:
        for name in ("train", "eval"):
            root.__dict__[name] = functools.partial(_baked, name)
    return module


@dataclass
class _Plan:
    """What :func:`bind` is about to do: sites to bind, sites that can't be, sites at odds with their owner."""

    first: bool
    program: bool
    modes: dict[str, bool]
    bindable: list[Site]
    stuck: list[tuple[Site, str]]
    odd: list[Site]


def _plan(root: nn.Module, keep: Sequence[str]) -> _Plan:
    found = sites(root)
    for site in found:
        if site.op.decomposed:
            raise _decomposed(str(site))
    kept = _kept(found, keep)
    modes, chosen, odd = _choose([site for site in found if site not in kept])
    stuck = [(site, why) for site in chosen if (why := site.refusal(not site.training))]
    bindable = [site for site in chosen if not site.refusal(not site.training)]
    _check_names(root, {site.owner for site in bindable})
    first = bool(modes) and not any(site.bound for site in found)
    return _Plan(first, _majority(list(modes.values())), modes, bindable, stuck, odd)


def _baked(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise BindError(f"{method}() cannot act on baked modes", remedy="call compile_modes.bind(module) first")


def _decomposed(where: str) -> BindError:
    return BindError(
        "the program is decomposed, and bind does not treat decomposed programs yet",
        where=where,
        remedy="bind the result of torch.export.export(), and decompose after exporting the bound module again",
    )


def _kept(found: list[Site], keep: Sequence[str]) -> set[Site]:
    if isinstance(keep, str):
        keep = (keep,)
    owners = sorted({site.owner for site in found})
    for pattern in keep:
        if not any(owner_matches(owner, pattern) for owner in owners):
            raise no_match(pattern, owners, "keep")
    return {site for site in found if any(owner_matches(site.owner, pattern) for pattern in keep)}


def _restore_state(root: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Puts back what ``module()`` drops of a strict eval export: the buffers that only train reads."""
    for name, tensor in program.state_dict.items():
        if attribute(root, name) is None:
            path, _, leaf = name.rpartition(".")
            holder = _ensure_module(root, path)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                holder.register_buffer(leaf, tensor)


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


def _ensure_module(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in path.split(".") if path else ():
        if name not in module._modules:
            child = nn.Module()
            child.training = module.training
            module.add_module(name, child)
        module = module.get_submodule(name)
    return module


def _bind_sites(root: nn.Module, found: list[Site]) -> set[nn.Module]:
    edited: set[nn.Module] = set()
    graphs = {body.graph: body for body in bodies(root)}
    for site in found:
        flag = _flag(root, site.body, site.owner)
        if site.op.flag is not None:
            set_argument(site, site.op.flag, flag)
        else:
            with site.node.graph.inserting_before(site.node):
                scaled = site.node.graph.call_function(operator.mul, (flag, site.p))
            set_argument(site, str(site.op.p), scaled)
        edited.add(site.body.module)
        if site.step is not None:
            body = graphs[site.step.graph]
            counters.bind(site.step, _flag(root, body, site.owner))
            edited.add(body.module)
        elif site.counter_at is not None:
            insert_step(site.counter_at, _flag(root, site.counter_at.body, site.owner))
            edited.add(site.counter_at.body.module)
    return edited


def _flag(root: nn.Module, body: Body, owner: str) -> fx.Node:
    """The node that reads ``owner``'s mode in the graph of ``body``."""
    if not body.path:
        target = join(owner, "training")
    elif owner == body.path or owner.startswith(body.path + "."):
        target = join(owner[len(body.path) + 1 :], "training")
    else:
        target = _cell(root, body, owner)
    return attr_node(body.graph, target)


def _cell(root: nn.Module, body: Body, owner: str) -> str:
    """For a body that cannot reach its owner: a stateless child of the owner, put into the body as well.

    ``train()`` and ``eval()`` reach it through the owner; it adds no key to any ``state_dict``, and deepcopy keeps
    the two places one object. A plain attribute would be lost there: GraphModule copies registered modules only.
    """
    module = root.get_submodule(owner)
    if _CELL not in module._modules:
        module.add_module(_CELL, nn.Module())
    cell = module._modules[_CELL]
    assert cell is not None
    cell.training = module.training
    for name, child in body.module._modules.items():
        if child is cell:
            return f"{name}.training"
    name = f"{_CELL}_{sum(n.startswith(_CELL) for n in body.module._modules)}"
    body.module.add_module(name, cell)
    return f"{name}.training"


def _drop_flags(body: Body) -> None:
    for node in list(body.graph.nodes):
        if node.target is operator.mul and not node.users and is_flag(node.args[0]):
            body.graph.erase_node(node)
    for node in list(body.graph.nodes):
        if is_flag(node) and not node.users:
            body.graph.erase_node(node)


def _warn_stuck(plan: _Plan) -> None:
    if not plan.stuck:
        return
    lines = [f"  {site.node.name} (owner {site.owner!r}): {why}" for site, why in plan.stuck]
    warnings.warn(
        f"{len(lines)} sites keep their exported mode and will not follow train() and eval():\n"
        + "\n".join(lines[:5] + ([f"  and {len(lines) - 5} more, see compile_modes.explain()"] if lines[5:] else []))
        + f"\n  what to do: export in {'eval' if plan.program else 'train'} mode, which keeps what they need",
        ModeWarning,
        stacklevel=3,
    )


def _warn_uncounted(plan: _Plan) -> None:
    """A batch norm module always has a counter; its absence means that export has dropped it."""
    lost = [
        site.owner
        for site in plan.bindable
        if site.op.counter and site.counter is None and module_type(site.node).startswith("torch.nn.modules.batchnorm.")
    ]
    if lost:
        warnings.warn(
            f"num_batches_tracked of {', '.join(map(repr, lost[:5]))} is not in the exported module and will not be "
            "counted (strict export in eval mode drops it).\n  what to do: bind the ExportedProgram instead",
            ModeWarning,
            stacklevel=3,
        )
