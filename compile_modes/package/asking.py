"""What is asked of a package: of which module, which modes, and which flags each of them is."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes._compat.cache import is_wrapper
from compile_modes.exported.exporting import export
from compile_modes.graph.dual import DualModule
from compile_modes.graph.finding import sites
from compile_modes.graph.flags import CELL
from compile_modes.graph.requests import MODES, check_overrides, no_match, owner_matches
from compile_modes.graph.sites import BOUND

TRAIN = "train"  # the one mode that has a backward
Vector = dict[str, bool]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` or :func:`precompile` has put around it."""
    inner = vars(module).get("_modules", {}).get("_orig_mod")
    wraps = is_wrapper(module) or hasattr(type(module), "wraps_a_module")
    return inner if inner is not None and wraps else module


def bound_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[nn.Module, list[str]]:
    """The bound module to compile: this one, or one exported of an eager module; and the names of its arguments.

    Raises:
        OptionError: the arguments are none, or sizes are given for a module that has its own.
        ExportError: the module can't be exported.
    """
    module = unwrapped(module)
    if not isinstance(args, tuple):
        raise messages.ARGS_NO_TUPLE.error(kind=type(args).__name__)
    if isinstance(module, DualModule) or getattr(module, "meta", {}).get(BOUND):
        if dynamic_shapes is not None:
            raise messages.SHAPES_OF_BOUND.error()
        bound = module
    else:
        bound = export(module, args, kwargs, dynamic_shapes=dynamic_shapes, progress=False)
    signature = vars(bound).get("__signature__")
    names = list(signature.parameters) if signature is not None else []
    names = names[: len(args)] + [f"input{i}" for i in range(len(names), len(args))]
    return bound, [*names, *(kwargs or {})]


def asked(modes: Any) -> dict[str, dict[str, str]]:
    """Globs of each mode, by its name.

    Raises:
        OptionError: something is no mode, or no name.
    """
    if isinstance(modes, str) or not isinstance(modes, Iterable) or not modes:
        raise messages.PACKAGE_MODES.error(modes=modes)
    given = dict(modes) if isinstance(modes, Mapping) else {name: name for name in modes}
    found = {}
    for name, wanted in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise messages.MODE_NAME.error(name=name)
        if isinstance(wanted, str):
            if wanted not in MODES:
                raise messages.NO_VECTOR.error(mode=wanted, name=name)
            wanted = {"*": wanted}
        found[name] = check_overrides(None, wanted, f"modes[{name!r}]")
    return found


def submodules(module: nn.Module) -> dict[str, str]:
    """The submodules of a bound module without parts of its graph; each name with the first that it has."""
    first: dict[int, str] = {}
    named: dict[str, str] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        if not any(part.startswith(CELL) for part in name.split(".")) and not _is_body(module, name):
            named[name] = first.setdefault(id(submodule), name)
    return named


def _is_body(module: nn.Module, name: str) -> bool:
    path: list[str] = []
    for part in name.split(".") if name else ():
        path.append(part)
        below = module.get_submodule(".".join(path))
        if part == "_guards_fn" or type(below).__name__.endswith("GraphModule") or hasattr(below, "graph"):
            return True
    return False


def deciders(module: nn.Module) -> list[str]:
    """The submodules whose flags make a difference, the root first, which always counts as one."""
    owners = {site.owner for site in sites(module) if site.bound}
    if isinstance(module, DualModule):
        owners.add("")
    named = submodules(module)
    return ["", *sorted({named.get(owner, owner) for owner in owners} - {""})]


def vectors(module: nn.Module, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, Vector]:
    """The flags of all submodules in each mode; those that no glob names are in eval mode.

    Raises:
        OverrideError: a glob names no submodule.
        OptionError: two modes are one.
    """
    named = submodules(module)
    owners, seen = deciders(module), dict[tuple[bool, ...], str]()
    found: dict[str, Vector] = {}
    for mode, globs in wanted.items():
        for pattern in globs:
            if not any(owner_matches(name, pattern) for name in named):
                raise no_match(pattern, owners, f"modes[{mode!r}]")
        flags = flags_in(module, globs)
        other = seen.setdefault(tuple(flags[owner] for owner in owners), mode)
        if other != mode:
            raise messages.SAME_VECTOR.error(one=other, other=mode)
        found[mode] = flags
    return found


def flags_in(module: nn.Module, globs: Mapping[str, str]) -> Vector:
    """The flags of a module's submodules in a mode, each under the first of its names."""
    return {name: _flag(name, globs) for name, first in submodules(module).items() if name == first}


def _flag(name: str, globs: Mapping[str, str]) -> bool:
    """The flag of a submodule: by the first glob that matches; ``*`` is for the rest, wherever it stands."""
    last = sorted(globs, key=lambda pattern: pattern == "*")
    return next((MODES[globs[pattern]] for pattern in last if owner_matches(name, pattern)), False)
