"""The backend ``pt2e_modes``: capture before autograd, put every site into its mode, hand over to Inductor."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import _compat, logs, messages
from compile_modes._compat import frames
from compile_modes.backend.capture import capture
from compile_modes.backend.flags_as_data import Plan, plan
from compile_modes.backend.mode_vectors import make_room
from compile_modes.backend.needed import may_lower
from compile_modes.backend.nested_regions import separate
from compile_modes.backend.options import Options
from compile_modes.backend.overrides import Asked, put_into_modes
from compile_modes.backend.owners import Names, name_owners
from compile_modes.backend.unreached import watch, watch_for
from compile_modes.errors import CaptureError, ModeWarning, few, summary
from compile_modes.forms.data import Inputs
from compile_modes.forms.deploy.running import deploying
from compile_modes.forms.lower import keyed, lower, lower_as_data
from compile_modes.graph.finding import sites
from compile_modes.graph.functional import is_kept
from compile_modes.graph.sites import BOUND, Site
from compile_modes.graph.view import View

_warned_modules: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def pt2e_modes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: ``torch.compile(m, backend="pt2e_modes", mode=..., options=...)``.

    Each site is compiled in the mode that Dynamo read from its owner's ``training``, and Dynamo guards on that read,
    so that every combination of modes in use compiles once. Options ask for something else:

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: as for stock ``torch.compile``.
        options: ``training``: None follows the flags, True or False forces all sites. ``overrides``:
            ``{owner glob: "train" | "eval"}``, first match wins. ``dropout_p``: ``{owner glob: probability}`` of
            attention that is put into train, but was traced in eval, where its probability is lost (torch's own
            ``MultiheadAttention`` is asked). Owners go by the names of ``named_modules()`` of the compiled module.
            ``mode_vectors``: how many combinations of modes to keep compiled per function, those used last; without
            it, Dynamo's ``recompile_limit`` holds, beyond which the function runs in eager mode. ``tune``: True folds
            batch norms in eval mode into the convolution in front, where gradients are needed and it saves memory.
            ``modes``: ``"data"`` has one graph for all modes of dropouts, which reads flags at each call, as far as
            nothing else depends on these flags; what stays guarded is warned of.
            ``freeze``: eval without gradients runs on weights that are folded and packed into constants, and computed
            again after each write to a parameter or buffer. ``"auto"`` sees nearly all writes, ``"strict"`` compares
            all bytes at each call; False, the default, leaves it. Anything else is an option of Inductor.

    Returns:
        What Inductor compiled.

    Raises:
        OptionError: an unknown option or mode, or an unusable value.
        OverrideError: a pattern matches no site, or a site can't be put into the mode asked for.
        CaptureError: the graph can't be retraced and modes were asked for.

    Warns:
        ModeWarning: the graph, or a part of it that has modes, can't be retraced, and goes to Inductor as it came; or
            it holds an exported module that is not bound; or Dynamo will not compile the next new combination of modes.
    """
    frames.at_compilations(_at_compilation)  # once more, for torch._dynamo.reset() forgets it
    parsed = Options.parse(mode, options)
    compile_fx = keyed(_compat.inductor(mode, dict(parsed.inductor)))
    compile_fx = deploying(compile_fx, parsed.freeze, mode, parsed.inductor)
    frames.name_graph_module()
    _warn_unbound(frames.frame_modules())
    if full := make_room((mode, repr(parsed)), parsed.mode_vectors):
        messages.warn_once(full)
    lowering = parsed.tune or parsed.freeze or parsed.modes or may_lower(gm)
    if not (parsed.explicit or lowering or logs.listening()):
        return compile_fx(gm, example_inputs)  # the modes are those that Dynamo has read
    try:
        captured = capture(gm, example_inputs)
    except CaptureError as error:
        if parsed.explicit:
            raise
        logs.left_to_stock(str(error))
        messages.AS_IT_CAME.warn_once(error=error.headline, where=error.where)
        return compile_fx(lower(gm, sites(gm)), example_inputs)
    if parsed.explicit:
        separate(captured)
    names = Names.of_frame()
    found = name_owners(View(captured), names)
    logs.graph("captured", captured)
    if not parsed.explicit:
        logs.modes(found, None)
        _warn_kept(found)
        data = plan(captured, found, names) if parsed.modes else Plan()
        added = lower_as_data(captured, found, data.chosen, tuned=parsed.tune)
        return _compile_either(compile_fx, captured, gm, example_inputs, data, added)
    asked = Asked(parsed.training, parsed.overrides, parsed.dropout_p, frames.is_whole_frame(gm))
    watch(asked.training, asked.overrides, (site.owner for site in found), whole=asked.whole)
    decision = put_into_modes(captured, found, names, asked, _refusal)
    lowered = lower(captured, found, tuned=parsed.tune)
    logs.graph("rewritten", lowered)
    return _advancing(compile_fx(lowered, example_inputs), decision.outside.values())


def _at_compilation(_: Any) -> None:
    watch_for(pt2e_modes)


frames.at_compilations(_at_compilation)
pt2e_modes.reset = _compat.reset_inductor  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def _compile_either(
    compile_fx: Callable[..., Callable[..., Any]],
    captured: fx.GraphModule,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    data: Plan,
    added: Inputs,
) -> Callable[..., Any]:
    """Compiles the captured graph, or, should Inductor fail on it, the graph that stock Inductor would have got.

    Guards go only once there is something compiled that reads flags itself.
    """
    logs.graph("rewritten", captured)
    try:
        return data.release(compile_fx(captured, [*example_inputs, *added.fakes]), added)
    except (*_compat.CONTROL_FLOW, ModeWarning):
        raise
    except Exception as error:  # Inductor's own; if the reason is not our stage, the second attempt raises it
        compiled = compile_fx(lower(gm, sites(gm)), example_inputs)
        logs.left_to_stock(f"{type(error).__name__}: {error}")
        messages.INDUCTOR_FAILED.warn_once(error=summary(error))
        return compiled


def _refusal(site: Site, training: bool, outside: dict[Site, nn.Module]) -> str:
    """As :meth:`Site.refusal`, but a counter that Dynamo's eval graph lacks can be advanced beside the graph."""
    why = site.refusal(training)
    if not why or not training or site.counter is None or site.step is not None or site.counter_at is not None:
        return why
    running_mean = site.body.view.origin(site.read(site.op.stats[0]))
    owner = frames.pin_owner(running_mean) if running_mean is not None and running_mean.op == "placeholder" else None
    if owner is None:
        return why
    if isinstance(getattr(owner, "num_batches_tracked", None), torch.Tensor):
        outside[site] = owner
    site.counter = None
    return site.refusal(training)


def _advancing(compiled: Callable[..., Any], owners: Iterable[nn.Module]) -> Callable[..., Any]:
    """Has the counters of these batch norms advance with each call."""
    references = [weakref.ref(owner) for owner in owners]

    def run(*args: Any) -> Any:
        for reference in references:
            module = reference()
            assert module is not None, "Dynamo's guards keep calls of dead modules away"
            module.num_batches_tracked.add_(1)  # type: ignore[operator]
        return compiled(*args)

    return run if references else compiled


def _warn_kept(found: Sequence[Site]) -> None:
    left = sorted({f"{site.op} (owner {site.owner!r})" for site in found if is_kept(site.op)})
    if left:
        messages.PART_AS_IT_CAME.warn_once(sites=few(left))


def _exported(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, fx.GraphModule | UnflattenedModule):
        yield module
    else:
        for child in module.children():
            yield from _exported(child)


def _warn_unbound(roots: Sequence[nn.Module]) -> None:
    for root in roots:
        for module in _exported(root):
            if module in _warned_modules:
                continue
            found = [
                s
                for s in sites(module)
                if s.training is not None and (s.op.whole or not s.op.refusal) and not s.hard_coded
            ]
            bound = getattr(module, "meta", {}).get(BOUND) or any(site.bound for site in found)
            if found and not bound:
                _warned_modules.add(module)
                messages.UNBOUND.warn(count=len(found))
