"""Standard programs of torch.export, in a mode: what ``python -m compile_modes bake`` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes._compat import pt2
from compile_modes.errors import ModeWarning
from compile_modes.exported import planning
from compile_modes.exported.assembling import reassemble
from compile_modes.exported.baking import write_back
from compile_modes.exported.binding import bind_root
from compile_modes.exported.lifting import relift, spell_out, spelled_out
from compile_modes.exported.planning import Plan
from compile_modes.exported.provenance import Source, flags, set_flags
from compile_modes.graph.dual import DualModule
from compile_modes.graph.explain import overriding
from compile_modes.graph.finding import find
from compile_modes.graph.flags import mode_of
from compile_modes.graph.requests import check_overrides
from compile_modes.graph.rewrite import assign
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View


@dataclass
class Request:
    """A program, and the modes that are asked of it. What was given is not edited.

    Attributes:
        view: the graphs of a module of its own, bound.
        program: the program that it was made from, with the present values of its state.
        holder: the module whose flags the sites read: that module, or the two-program module around it.
        name: how ``program`` is called among those that the module was made from.
        plan: how it was bound; None if two exports decided that.
        remarks: what else binding would warn of.
        exact: the stored program of the mode that is asked for, where there is one.
        modes: the mode that each site is asked to be in; the site itself says in which it was exported.
        overridden: sites that an override names.
        refused: those of them that can't be put there, with the reason.
        complaints: what else isn't, or may not be, in the mode that is asked for. If none is: in the other mode.
    """

    view: View
    program: ExportedProgram
    holder: nn.Module
    name: str = "model"
    plan: Plan | None = None
    remarks: list[ModeWarning] = field(default_factory=list)
    exact: ExportedProgram | None = None
    modes: dict[Site, bool | None] = field(default_factory=dict)
    overridden: set[Site] = field(default_factory=set)
    refused: list[tuple[Site, str]] = field(default_factory=list)
    complaints: list[ModeWarning] = field(default_factory=list)

    @property
    def changed(self) -> list[Site]:
        """The sites that are to be in another mode than they were exported in, and can be."""
        refused = {site for site, _ in self.refused}
        return [s for s, mode in self.modes.items() if mode is not s.training and not s.modeless and s not in refused]

    def carried_out(self) -> ExportedProgram:
        """The program in these modes. To be called once: it edits the module."""
        if self.exact is not None:
            return spelled_out(self.exact)
        changed = self.changed
        if not changed:
            return spelled_out(self.program)
        attention = [site.node for site in changed if site.op.family == "attention"]
        root = self.view.root
        write_back(self.view, {s: bool(mode) for s, mode in self.modes.items() if s.bound or s in changed})
        spell_out(root)
        return in_dialect_of(self.program, relift(root, self.program, attention))


def baked(
    exported: ExportedProgram | nn.Module,
    training: bool | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    allow_stuck: bool = False,
) -> ExportedProgram:
    """The standard program of a mode: ATen ops and literals only, for whatever takes programs of torch.export.

    Signature, dynamic shapes, example inputs, constants and weights are those of the program that it is made from. A
    program below training IR stays one.

    Args:
        exported: an ExportedProgram; or what :func:`compile_modes.bind` made of one, :func:`compile_modes.export` of a
            model, or :func:`compile_modes.load` of a file. It stays as it is. Weights are shared, not copied.
        training: the mode, as ``train()`` and ``eval()`` set it; None for the present modes. Of two programs, it says
            which, with all that Python has decided in it.
        overrides: ``{owner glob: "train" | "eval"}`` for single sites, also for those whose literal is hard-coded.
        allow_stuck: whether to warn of what can't be put into that mode, instead of raising.

    Raises:
        BindError: something can't be put into that mode; or ``exported`` was not made from a program, or was edited.
        OverrideError: a pattern matches no site, or one that can't be put into its mode.
        OptionError: a mode is none.

    Warns:
        ModeWarning: with ``allow_stuck``, what is not in that mode.
    """
    request = prepare(exported, training, overrides)
    if request.refused and not allow_stuck:
        raise messages.OVERRIDES_REFUSED.error(sites=_refused(request))
    if request.complaints and not allow_stuck:
        raise messages.NOT_IN_MODE.error(complaints="\n".join(map(str, request.complaints)))
    for warning in [*refusals(request), *request.complaints]:
        messages.warn(warning)
    return request.carried_out()


def refusals(request: Request) -> list[ModeWarning]:
    """What to say of the overrides that can't be carried out; empty if all can."""
    return [messages.OVERRIDES_STUCK.warning(sites=_refused(request))] if request.refused else []


def _refused(request: Request) -> str:
    return "\n".join(f"  {site}: {why}" for site, why in request.refused)


def prepare(
    exported: ExportedProgram | nn.Module, training: bool | None = None, overrides: Mapping[str, str] | None = None
) -> Request:
    """Finds out what :func:`baked` would do; it raises what that does but for sites that can't be put into a mode."""
    overrides = check_overrides(training, overrides)
    module = getattr(exported, "_orig_mod", exported)
    if isinstance(module, ExportedProgram):
        request, present = _one(module, (), None), None
    else:
        request, present = _stored(module, training), flags(module)
    found = find(request.view)
    if present is not None:
        set_flags(request.holder, present)
    if training is not None:
        request.holder.train(training)
    now = {s: mode_of(s.body, s.node, s.op)[0] if s.bound else s.training for s in found}
    asked = dict(assign(found, None, overrides))
    request.modes = {site: asked.get(site, mode) for site, mode in now.items()}
    request.overridden = {site for site in asked if not site.modeless}
    request.refused = [(site, why) for site, mode in asked.items() if (why := site.refusal(mode))]
    request.complaints = _complaints(request, training)
    if overrides or training is None:
        request.exact = None
    return request


def _one(program: ExportedProgram, keep: Sequence[str], dropout_p: Mapping[str, float] | None) -> Request:
    root, plan, remarks = bind_root(program, keep, dropout_p)
    return Request(View(root), program, root, plan=plan, remarks=remarks)


def _stored(module: nn.Module, training: bool | None) -> Request:
    """A fresh module from what ``module`` was made from, in the modes that its program was exported in."""
    source = Source.of(module)
    if source is None:
        raise messages.NOT_OF_A_PROGRAM.error(kind=type(module).__name__)
    if not source.made(module):
        raise messages.EDITED.error()
    stored = {name: _with_state_of(module, program) for name, program in source.programs.items()}
    if stored.keys() == {"model"}:
        return _one(stored["model"], source.keep, source.dropout_p or None)
    mode = module.training if training is None else training
    exact = stored["train" if mode else "eval"]
    holder = reassemble(stored, {}, source.known)
    if isinstance(holder, DualModule):
        return Request(View(holder.train(mode).program(mode)), exact, holder, "train" if mode else "eval", exact=exact)
    return Request(View(holder.train()), stored["train"], holder, "train", exact=exact)


def _with_state_of(module: nn.Module, program: ExportedProgram) -> ExportedProgram:
    """A program around the present values of the module that was made from it."""
    held = dict(module.named_buffers(remove_duplicate=False)) | dict(module.named_parameters(remove_duplicate=False))
    constants = {
        name: held.get(name, program.constants[name]) for name in program.graph_signature.non_persistent_buffers
    }
    state = {name: held.get(name, value) for name, value in program.state_dict.items()}
    for name, value in {**state, **constants}.items():
        before = program.state_dict[name] if name in state else program.constants[name]
        if isinstance(before, torch.Tensor) and _kind(value) != _kind(before):
            raise messages.OTHER_STATE.error(before=_kind(before), now=_kind(value), name=name)
    return pt2.with_state(program, state, {**program.constants, **constants})


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def _complaints(request: Request, training: bool | None) -> list[ModeWarning]:
    """What binding would warn of, as far as it concerns the modes that are asked for."""
    plan, modes = request.plan, request.modes
    asks = training is not None or bool(request.overridden)
    if not asks:
        return [*planning.complaints(plan), *request.remarks] if plan is not None else []
    waking = [s for s, mode in modes.items() if s.bound and mode and s.training is False]
    calming = training is False or any(s.bound and mode is False and s.training for s, mode in modes.items())
    named = {site.node for site in request.overridden}
    stuck: list[tuple[Site, str]] = []
    if training is not None:
        planned = plan.stuck if plan is not None else []
        stuck = [(s, why) for s, why in planned if s.training is not training and s.node not in named]
        computed = [s for s in modes if s.training is None and not s.modeless and s not in request.overridden]
        stuck += [(s, s.refusal(training)) for s in computed]
    program = plan.program if plan is not None else bool(request.view.root.training)
    concerned = Plan(request.view, False, program, {}, waking, stuck, [], set(), overriding=overriding(waking))
    if plan is not None and calming:
        concerned.unclear, concerned.written = plan.unclear, plan.written
    same = plan is not None and bool(plan.modes) and plan.program is training and not request.changed
    return [*planning.complaints(concerned), *([] if same else request.remarks)]


def in_dialect_of(program: ExportedProgram, lifted: ExportedProgram) -> ExportedProgram:
    """Takes apart again what binding has put together, and nothing that the program has whole."""
    if program.dialect == "TRAINING":
        return lifted
    known = _targets(program)
    table = {op: f for op, f in torch.export.default_decompositions().items() if op in _targets(lifted) - known}
    decomposed: ExportedProgram = lifted.run_decompositions(table)
    return decomposed


def _targets(program: ExportedProgram) -> set[Any]:
    return {node.target for node in View(program.graph_module).nodes()}
