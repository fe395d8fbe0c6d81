"""What is kept of a module between calls: which modules draw random numbers, its parts, and what they hold for."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compile_modes import messages
from compile_modes._compat.compilers import compiler_of
from compile_modes.backend.options import OWN_OPTIONS
from compile_modes.errors import ExportError, ModeWarning, first_line
from compile_modes.graph.finding import sites
from compile_modes.graph.requests import no_match, owner_matches
from compile_modes.sampling import looping
from compile_modes.sampling.batching import Results, at_once, one_by_one, quiet, tried
from compile_modes.sampling.capturing import capture
from compile_modes.sampling.finding import Drawing, Found, find
from compile_modes.sampling.splitting import Parts, split
from compile_modes.sampling.standing import Standing

_KEPT = 8  # plans per module, the ones that were used last
_plans: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, Plan]]" = weakref.WeakKeyDictionary()
_making = threading.RLock()  # flags are set meanwhile, which are everybody's


@dataclass
class Plan:
    """How a module is sampled from, for inputs of one kind.

    Attributes:
        standing: what must be as it was.
        live: the modules that are in train.
        parts: the two parts; None if no graph could be made.
        first: runs what comes before all random numbers.
        second: runs the rest for some repetitions.
        whole: whether all chunks have to be of one size, because each size is compiled.
        spec: the structure of the outputs.
        warning: why it runs in a loop, if it does.
    """

    standing: Standing
    live: Sequence[Drawing]
    parts: Parts | None = None
    first: Callable[..., Any] | None = None
    second: Callable[..., Results] | None = None
    whole: bool = False
    spec: Any = None
    warning: ModeWarning | None = None


def plan_for(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], which: Sequence[str]) -> Plan:
    """The plan for a call, from before if that still holds."""
    with _making:
        kept = _plans.setdefault(module, OrderedDict())
        key = (*_signature(args, kwargs), tuple(which))
        plan = kept.get(key)
        if plan is None or not plan.standing.holds(module):
            plan = _make(module, args, kwargs, which)
            before = [other.warning.code for other in kept.values() if other.warning is not None]
            kept[key] = plan
            if plan.warning is not None and plan.warning.code not in before:  # once for a module
                messages.warn(plan.warning)
        kept.move_to_end(key)
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return plan


def _signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return (spec, *casts, *map(_kind, leaves))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else None
        return type(leaf), leaf.shape, strides, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, int | float | str | bool | None) else (type(leaf), id(leaf))


def _make(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], which: Sequence[str]) -> Plan:
    eager = getattr(module, "_orig_mod", module)
    standing = Standing(module)
    found = find(eager, args, kwargs)
    live = _chosen(eager, found, which)
    try:
        root = capture(eager, args, kwargs, live)
    except ExportError as error:
        looping.check(live)
        warning = messages.NOT_CAPTURED.warning(kind=type(eager).__name__, why=error.headline)
        return Plan(standing, live, warning=warning)
    spec = root.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    return _ready(module, Plan(standing, live, split(root), spec=spec), args, kwargs)


def _ready(module: nn.Module, plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
    """Tries the parts, and has them compiled if the module is."""
    assert plan.parts is not None
    with torch.no_grad():
        results = plan.parts.first(*pytree.tree_leaves((tuple(args), dict(kwargs))))
    trial, compiler = tried(plan.parts, results[: len(plan.parts.own)]), compiler_of(module, OWN_OPTIONS)
    if trial.error is not None:
        why = first_line(trial.error)
        plan.warning = messages.LOOPED.warning(op=trial.op, owner=repr(trial.owner), why=why)
        plan.first, plan.second = plan.parts.first, one_by_one(plan.parts)
    elif compiler is None:
        run = at_once(plan.parts)
        plan.first, plan.second = plan.parts.first, quiet(run) if trial.slow else run
    else:
        plan.first, plan.second, plan.whole = compiler(plan.parts.first), compiler(at_once(plan.parts)), True
    return plan


def _chosen(module: nn.Module, found: Found, which: Sequence[str]) -> list[Drawing]:
    """The modules that some globs name; raises OverrideError for one that names none, and SampleError."""
    if not found.drawing and not found.always:
        if _is_unbound(module):
            raise messages.NOT_BOUND_YET.error()
        raise messages.NOTHING_RANDOM.error(kind=type(module).__name__)
    names = [name for drawing in found.drawing for name in drawing.names]
    for pattern in which:
        if not any(owner_matches(name, pattern) for name in names) and not (pattern == "*" and found.always):
            raise no_match(pattern, names, "which", "stochastic")
    chosen = [d for d in found.drawing if any(owner_matches(name, p) for name in d.names for p in which)]
    for drawing in chosen:
        if drawing.outputs:
            owner = repr(drawing.names[0])
            raise messages.OTHER_OUTPUTS.error(train=drawing.outputs, evaluation=found.outputs, owner=owner)
    return chosen


def _is_unbound(module: nn.Module) -> bool:
    """Whether a module is an exported program whose sites don't follow any flag."""
    return isinstance(module, fx.GraphModule) and any(not site.bound and not site.modeless for site in sites(module))
