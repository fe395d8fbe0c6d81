"""``diff``: what two programs, or a program before and after a tool, differ in."""

import os
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from compile_modes import messages
from compile_modes.errors import BindError
from compile_modes.exported.differing import sites, weights
from compile_modes.exported.differing.report import DiffReport, SiteDifference
from compile_modes.graph.dual import DualModule
from compile_modes.graph.finding import graph_root
from compile_modes.graph.view import View

_EAGER = (
    "export both models, by torch.export.export() or compile_modes.export(), and compare these; "
    "compile_modes.verify(module, model, *args) runs a module beside its eager model"
)
_FILE = "load it by torch.export.load() or compile_modes.load(); or compare files by compile-modes diff"
_OTHER = "compare programs of torch.export, or modules with a graph"


def diff(a: Any, b: Any) -> DiffReport:
    """What two programs, or a program before and after a tool, differ in: modes, literals, sites, weights.

    Sites are paired by what they belong to: a norm by the module that holds its statistics, any other by its owner; of
    several with the same owner, in order. Sites of a family that have no partner so are paired in order if there are as
    many on both sides, for tools forget owners. Compared of a pair are the op, the mode, what holds it (a flag or a
    literal), and all arguments that aren't tensors. Weights are paired by name, and compared bit for bit, but for NaNs,
    which are equal to NaNs, and zeros. Of other ops nothing is said: programs without a difference may compute
    something else.

    >>> before = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), (torch.ones(2, 4),))
    >>> report = diff(before, bind(before).eval())
    >>> print(report.sites[0].text)
    mode: train -> eval, held by: literal -> flag

    Args:
        a: an ExportedProgram, a GraphModule (exported, bound, captured or PT2E-prepared), an UnflattenedModule, what
            :func:`export` returns, or an OptimizedModule around one of these.
        b: the same. Nothing is changed in either.

    Returns:
        The report. It is false if nothing differs; ``print`` shows it as a table, notebooks as HTML, ``to_json()``
        gives data and ``html()`` a page.

    Raises:
        BindError: one of them holds no graph, such as an eager model.
    """
    return compared(a, b, (_kind(a), _kind(b)))


def compared(a: Any, b: Any, names: tuple[str, str]) -> DiffReport:
    """As :func:`diff`, with names for the two in the report."""
    one, other = _programs(a, "the first argument"), _programs(b, "the second argument")
    found: list[SiteDifference] = []
    pairs = 0
    for program, first, second in _matched(a, b, one, other):
        more, count = sites.differing(sites.described(first), sites.described(second), program)
        found += more
        pairs += count
    held = weights.weights_of(_plain(a), list(one.values())), weights.weights_of(_plain(b), list(other.values()))
    unequal, left_out, tensors = weights.differing(*held)
    said = {"sites": pairs, "weights": tensors}
    return DiffReport(names, tuple(found), tuple(unequal), _difference(a, b), said, left_out)


def _plain(obj: Any) -> Any:
    return getattr(obj, "_orig_mod", obj)


def _kind(obj: Any) -> str:
    return type(_plain(obj)).__name__


def _programs(obj: Any, where: str) -> dict[str | None, View]:
    """The programs of an object by name; None is the name of a single one."""
    module = _plain(obj)
    if isinstance(module, DualModule):
        return {name: View(module.program(name == "train")) for name in ("train", "eval")}
    try:
        return {None: View(graph_root(module))}
    except BindError as error:
        eager = isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule)
        remedy = _EAGER if eager else _FILE if isinstance(module, str | os.PathLike) else _OTHER
        raise messages.NOT_COMPARABLE.error(kind=_kind(obj), where=where, remedy=remedy) from error


def _matched(
    a: Any, b: Any, one: Mapping[str | None, View], other: Mapping[str | None, View]
) -> list[tuple[str | None, View, View]]:
    """Which program to compare with which: a single one with that of the present mode of the other module."""
    if one.keys() == other.keys():
        return [(name, one[name], other[name]) for name in one]
    both = _plain(a if len(one) == 2 else b)
    name = "train" if both.training else "eval"
    return [(name, one.get(name) or one[None], other.get(name) or other[None])]


def _difference(a: Any, b: Any) -> str:
    """What differs in the programs that two modules hold, in words; empty if nothing does."""
    a, b = (_plain(obj) for obj in (a, b))
    twos = [obj for obj in (a, b) if isinstance(obj, DualModule)]
    if len(twos) == 1:
        which = "the first" if isinstance(a, DualModule) else "the second"
        mode = "train" if twos[0].training else "eval"
        return (
            f"{which} has two programs, the other has one, which is compared with that of {mode} mode, the present one"
        )
    if twos and a.difference != b.difference:
        return f"the two programs of the first differ in {a.difference}, those of the second in {b.difference}"
    return ""
