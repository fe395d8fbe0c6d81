"""What options ask of modules that Dynamo leaves to eager mode, of which the backend never hears.

After a graph break within a loop, say, or around an RNN, Dynamo leaves a whole function to eager mode, and compiles
none of torch's own modules that are called there. Once a call of the compiled module is over, it is known who was met.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compile_modes import _compat, messages
from compile_modes._compat import frames
from compile_modes.backend.overrides import check_eager, check_names, wanted
from compile_modes.errors import OptionError, few
from compile_modes.graph.requests import check_overrides


@dataclass
class _Known:
    """What is known of the compilations of modules of one structure with the same options.

    Attributes:
        met: the owners of all sites that were compiled.
        started: whether a compilation has started from which no whole graph has come yet.
        parted: whether any was known to have come in parts, or to have come to nothing.
    """

    met: set[str] = field(default_factory=set)
    started: bool = False
    parted: bool = False


# By options and structure rather than by module: Dynamo shares compiled code between instances.
_known: dict[tuple[Any, ...], _Known] = {}


def watch(training: bool | None, overrides: Mapping[str, str], owners: Iterable[str], *, whole: bool) -> None:
    """Has later calls of the module whose compilation is in progress warn of what options have not reached.

    Args:
        training: the option.
        overrides: the option.
        owners: full names of the owners of sites in the graph that is being compiled.
        whole: whether that graph is all of the module.
    """
    if (known := _watch(training, overrides)) is not None:
        known.met.update(owners)
        known.started = known.started and not whole
        known.parted = known.parted or not whole


def _watch(training: bool | None, overrides: Mapping[str, str]) -> _Known | None:
    root = frames.compiled_root()
    if root is None:
        return None
    options = training, tuple(overrides.items())
    structure = tuple((name, type(module)) for name, module in root.named_modules())
    known = _known.setdefault((options, structure), _Known())
    frames.after_calls(options, lambda module: _may_be_left(module, training, overrides, known))
    return known


def watch_for(backend: Any) -> None:
    """As :func:`watch`, if it is ``backend`` that the module is compiled by; Dynamo may find no graph to give it.

    Raises:
        OverrideError: options ask for something else than the flag of a module that Dynamo will leave to eager mode.
    """
    options = frames.options_for(backend) or {}
    training = options.get("training")
    try:
        overrides = check_overrides(training, options.get("overrides"))
    except OptionError:
        return  # the backend raises it, to which Dynamo gives a better frame
    root = frames.compiled_root()
    if root is not None:
        check_eager(dict(root.named_modules()), training, overrides)
    if (training is not None or overrides) and (known := _watch(training, overrides)) is not None:
        known.parted, known.started = known.parted or known.started, True


def _may_be_left(root: nn.Module, training: bool | None, overrides: Mapping[str, str], known: _Known) -> bool:
    """Warns of modules that were not met and are asked to be in another mode; returns whether any may be later."""
    if not known.started and not known.parted:
        return False  # all of it is compiled, and what was not met was not called
    named = dict(root.named_modules())
    asked = {name: wanted(name, training, overrides) for name in named}
    left = [n for n, module in named.items() if n not in known.met and asked[n] is not None and _has_a_mode(module)]
    lost = [f"{n!r} ({type(named[n]).__name__})" for n in left if asked[n] is not named[n].training]
    if lost:
        about = id(root), training, *overrides.items()
        messages.NOT_COMPILED.warn_once(*about, modules=few(lost))
    check_names(overrides, named)
    return bool(left) and not lost


def _has_a_mode(module: nn.Module) -> bool:
    """Whether a module is one of torch's that compute something else in train."""
    if isinstance(module, _compat.DROPOUT):
        return bool(module.p > 0)
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0 and module.num_layers > 1)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return isinstance(module, nn.RReLU) or (isinstance(module, _compat.NORMS) and module.track_running_stats)
