"""``bind``: flags that a graph reads, instead of literals that it has swallowed."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes._compat import copies, direct_calls
from compile_modes.console import progress
from compile_modes.errors import CompileModesError, ModeWarning
from compile_modes.exported import planning
from compile_modes.exported.arguments import take_names
from compile_modes.exported.faithful import lost_grad_mode
from compile_modes.exported.lost import left_nothing, remark, remark_nothing
from compile_modes.exported.provenance import Source
from compile_modes.exported.recompose import recompose
from compile_modes.graph import calls
from compile_modes.graph.aliases import REUSED, reused
from compile_modes.graph.dual import DualModule
from compile_modes.graph.edits import attr_node, insert_dropout, insert_step, loosen_views, own, set_argument
from compile_modes.graph.finding import graph_root
from compile_modes.graph.flags import CELL, Cell
from compile_modes.graph.owners import join
from compile_modes.graph.rewrite import make_one_node
from compile_modes.graph.sites import BOUND, HARD_CODED, KEPT, Site, add_note
from compile_modes.graph.view import Body, View, attribute

_LARGE = 10_000  # nodes, from which on a progress bar is worth its line
_STAGES = ("module of the program", "sites", "flags", "what is left")


def bind(exported: Any, *, keep: Sequence[str] = (), dropout_p: Mapping[str, float] | None = None) -> Any:
    """Gives an exported program working ``train()`` and ``eval()``, submodule by submodule.

    Each mode-dependent site reads its owner's ``training`` afterwards, so eager calls follow it and Dynamo guards on
    it: under ``torch.compile``, each combination of modes in use compiles once. Binding alone changes no behaviour:
    each owner's flag starts as the mode that its sites were exported in. Sites of one owner that disagree with its
    majority (``training=True`` written into the model) keep their literal; :func:`explain` lists them.

    Args:
        exported: an ExportedProgram, the GraphModule of ``ep.module()``, a PT2E-prepared GraphModule, an
            UnflattenedModule, or an OptimizedModule around one of these. Modules are bound in place; parameters,
            buffers and ``state_dict`` keys stay as they are.
        keep: globs of owners whose sites keep their literal, also when the module is bound again, and of modules that
            need no mode; and of buffers that are written in both modes.
        dropout_p: attention dropout that an eval export has lost, ``{owner glob: probability}``; first match wins.

    Returns:
        The bound module: ``exported`` itself, or the new module of an ExportedProgram.

    Raises:
        BindError: there is no graph, or an owner's name is taken by another attribute.
        OptionError: ``keep`` or ``dropout_p`` are not usable, or the site has kept its probability.
        OverrideError: a pattern matches no site.

    Warns:
        ModeWarning: some sites can't follow the flag, with the reason for each; or a train export writes other buffers
            than those of its norms, which will be written in eval too; or the program is decomposed and has
            parts that are no sites any more; or an eval export has lost what modules may do in train; or the export may
            have lost a ``no_grad()`` inside an autocast region.
    """
    if isinstance(getattr(exported, "_orig_mod", exported), DualModule):
        if keep or dropout_p:
            raise messages.BOUND_ALREADY.error()
        return exported  # bound when it was made
    root, plan, remarks = bind_root(exported, keep, dropout_p)
    lost = lost_grad_mode(plan.view)
    for warning in [*planning.complaints(plan), *remarks, *([lost] if lost else [])]:
        messages.warn(warning)
    if isinstance(exported, torch.export.ExportedProgram):
        keep = [keep] if isinstance(keep, str) else keep
        Source({"model": exported}, keep=keep, dropout_p=dropout_p).stay_with(root)
        return root
    return exported


def bind_root(
    exported: Any, keep: Sequence[str], dropout_p: Mapping[str, float] | None
) -> tuple[nn.Module, planning.Plan, list[ModeWarning]]:
    """Binds as :func:`bind` does, without its warnings.

    Returns:
        The bound module with the graph, what was planned (its sites in the modes of before), and what else to warn of.
    """
    size = len(exported.graph.nodes) if isinstance(getattr(exported, "graph", None), fx.Graph) else 0
    with progress("bind", _STAGES, show=size >= _LARGE) as advance:
        return _bind_root(exported, keep, dropout_p, advance)


def _bind_root(
    exported: Any, keep: Sequence[str], dropout_p: Mapping[str, float] | None, advance: Callable[[], None]
) -> tuple[nn.Module, planning.Plan, list[ModeWarning]]:
    """As :func:`bind_root`; ``advance`` is called after each of the stages."""
    root = graph_root(exported)
    program = exported if isinstance(exported, torch.export.ExportedProgram) else None
    if program is not None:
        _restore_state(root, program)
    advance()
    recomposed = recompose(View(root), program)
    view = recomposed.view
    gone = [] if recomposed.decomposed else left_nothing(view, program)
    try:
        plan = planning.plan_binding(view, keep, dropout_p, gone, decomposed=recomposed.decomposed)
    except CompileModesError:
        recomposed.undo()
        raise
    if own(view):
        plan = planning.plan_binding(View(root), keep, dropout_p, gone, decomposed=recomposed.decomposed)
    advance()
    take_names(root)  # first: carrying out generates the code
    carry_out(plan)
    advance()
    trains = any(plan.modes.values()) or any(site.training for site in plan.kept)
    if recomposed.decomposed:
        remarks = remark(View(root), program, trains)
    else:
        remarks = None if trains else remark_nothing(root, plan.gone)
    advance()
    return root, plan, [remarks] if remarks else []


def carry_out(plan: planning.Plan) -> None:
    """Binds a module as planned, and gives it the ``train()`` and ``eval()`` of nn.Module."""
    root = plan.view.root
    for owner in {site.owner for site in plan.bindable}:
        ensure_module(root, owner)
    _merge_aliases(root, plan.modes)
    if plan.first:
        for module in root.modules():
            module.training = plan.program
    for site in plan.bindable:
        root.get_submodule(site.owner).training = plan.modes[site.owner]
        if reused(site):
            add_note(site.node, **{REUSED: True})
    for site in plan.odd:
        add_note(site.node, mode=HARD_CODED)
    for site in plan.kept:
        add_note(site.node, mode=KEPT)
    if isinstance(root, fx.GraphModule):
        root.meta[BOUND] = True
    for site in plan.inverted:
        add_note(site.node, inverted=True)
    edited = _bind_sites(plan)
    for module in [root, *(body.module for body in plan.view.bodies)]:
        module.__dict__.pop("train", None)  # the methods by which export forbids what now works
        module.__dict__.pop("eval", None)
    if isinstance(root, fx.GraphModule):
        copies.copy_compiled(root)
    if isinstance(root, fx.GraphModule) and direct_calls.is_stale(root):
        edited.add(root)
    for module in edited:
        _compat.refresh(module)


def _restore_state(root: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Puts back what ``module()`` drops of a strict eval export: the buffers that only train reads."""
    for name, tensor in program.state_dict.items():
        if attribute(root, name) is None:
            path, _, leaf = name.rpartition(".")
            holder = ensure_module(root, path)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                holder.register_buffer(leaf, tensor)


def ensure_module(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a path; made, with those around it, if there is none. It begins in its parent's mode."""
    module = root
    for name in path.split(".") if path else ():
        if name not in module._modules:
            if hasattr(module, name):
                kind = type(getattr(module, name)).__name__
                raise messages.NAME_TAKEN.error(kind=kind, owner=path, name=name)
            child = nn.Module()
            child.training = module.training
            module.add_module(name, child)
        module = module.get_submodule(name)
    return module


def _merge_aliases(root: nn.Module, modes: dict[str, bool]) -> None:
    """Makes one module again of what was one module under several names before export, so that it has one mode.

    Known by its state: the leaves that export leaves behind hold the same tensors then. An alias of a module without
    state can't be told.
    """
    first: dict[tuple[Any, ...], nn.Module] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        state = [(name, id(t)) for name, t in {**module._parameters, **module._buffers}.items() if t is not None]
        if type(module) is nn.Module and state and not module._modules:
            one = first.setdefault((modes.get(path), *state), module)
            parent, _, name = path.rpartition(".")
            root.get_submodule(parent)._modules[name] = one


def _bind_sites(plan: planning.Plan) -> set[nn.Module]:
    edited: set[nn.Module] = set()
    for site in plan.bindable:
        make_one_node(site)
        flag = flag_node(site.body, site.owner)
        if site in plan.inverted:
            with site.node.graph.inserting_before(site.node):
                flag = site.node.graph.call_function(operator.not_, (flag,))
        if site.op.flag is not None:
            set_argument(site, site.op.flag, flag)
            if site in plan.supplied:
                set_argument(site, str(site.op.p), plan.supplied[site])
        elif site.op.p is None:
            insert_dropout(site, plan.supplied[site], flag)
        else:
            p = plan.supplied.get(site, site.p)
            with site.node.graph.inserting_before(site.node):
                scaled = site.node.graph.call_function(operator.mul, (flag, p))
            add_note(site.node, p=p)  # Dynamo makes a literal of the product
            set_argument(site, str(site.op.p), scaled)
            loosen_views(site.node)
        edited.add(site.body.module)
        if site.step is not None:
            edited.add(_bind_step(site))
        elif site.counter_at is not None:
            insert_step(site.counter_at, flag_node(site.counter_at.body, site.owner))
            edited.add(site.counter_at.body.module)
    edited |= {_bind_step(site) for site in plan.counting}
    return edited


def _bind_step(site: Site) -> nn.Module:
    """Makes the step of a site's counter follow the owner; returns the module whose graph it stands in."""
    assert site.step is not None
    body = site.body.view.body(site.step)
    calls.bind_counter(site.step, flag_node(body, site.owner))
    return body.module


def flag_node(body: Body, owner: str) -> fx.Node:
    """The node that reads ``owner``'s mode in the graph of ``body``."""
    if not body.path:
        target = join(owner, "training")
    elif owner == body.path or owner.startswith(body.path + "."):
        target = join(owner[len(body.path) + 1 :], "training")
    else:
        target = _cell(body, owner)
    return attr_node(body, target)


def _cell(body: Body, owner: str) -> str:
    """The attribute of a body that cannot reach its owner by which it reads the owner's mode."""
    module = body.view.root.get_submodule(owner)
    for name, child in body.module._modules.items():
        if isinstance(child, Cell) and child.owner is module:
            return f"{name}.training"
    name = f"{CELL}_{sum(n.startswith(CELL) for n in body.module._modules)}"
    body.module.add_module(name, Cell(module))
    return f"{name}.training"
