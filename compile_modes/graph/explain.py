"""A program's sites as data and as text."""

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from compile_modes import _compat, console, messages, pages
from compile_modes.files import FileLike
from compile_modes.graph.aliases import reused
from compile_modes.graph.dual import DualModule
from compile_modes.graph.effects import viewed, written_operands
from compile_modes.graph.finding import find, graph_root
from compile_modes.graph.flags import is_flag
from compile_modes.graph.ops import lookup
from compile_modes.graph.owners import module_classes
from compile_modes.graph.regions import samplers
from compile_modes.graph.requests import MODES
from compile_modes.graph.sites import KEPT, REMARKS, Site, note
from compile_modes.graph.view import Body, View


class Explanation(str):
    """What :func:`explain` gives: text, which notebooks show as HTML.

    Attributes:
        data: what is shown, as :func:`survey` gives it.
    """

    data: Mapping[str, Any]

    def _repr_html_(self) -> str:
        return pages.fragment(pages.explanation(self.data))


def explain(obj: Any, *, html: FileLike | None = None) -> Explanation:
    """A table of the sites of ``obj``: op, owner, mode, literals, and each switch that isn't possible, with the reason.

    "held by" says what decides the mode: a ``flag`` that the graph reads, the ``literal`` that export has baked in, one
    that is ``hard-coded`` (at odds with its owner's flag) or ``kept`` (on request).

    Below it stands what may depend on mode although nothing in the program says so: random numbers that are drawn, and
    buffers that are written, in both modes.

    Args:
        obj: what :func:`sites` takes.
        html: a file to write the same to, as a page that needs no network: the tree of modules with the mode of each
            site, search and filters, and what each code means. A path, in whose place it appears whole or not at all;
            or a stream of bytes.

    Returns:
        The table: a ``str``, which notebooks show as HTML.

    Raises:
        BindError: ``obj`` holds no graph.
        OptionError: ``html`` is no file.
        ArchiveError: the page can't be written.
        CompileModesError: rich is not installed.
    """
    data = survey(obj)
    text = Explanation(as_text(data))
    text.data = data
    if html is not None:
        module = getattr(obj, "_orig_mod", obj)
        pages.write(pages.document(f"Modes: {type(module).__name__}", pages.explanation(data)), html)
    return text


def survey(obj: Any) -> dict[str, Any]:
    """What :func:`explain` shows, as data that JSON can hold.

    Args:
        obj: what :func:`sites` takes.

    Returns:
        - ``difference``: of two programs, what they differ in besides modes; None for one program.
        - ``programs``: one item, or two for a module with two programs, as :func:`surveyed` gives them.
    """
    module = getattr(obj, "_orig_mod", obj)
    if not isinstance(module, DualModule):
        view = View(graph_root(module))  # once: each call of a program's module() makes other nodes
        return {"difference": None, "programs": [surveyed(view, find(view))]}
    views = {name: View(module.program(name == "train")) for name in ("train", "eval")}
    programs = [surveyed(view, find(view), name) for name, view in views.items()]
    return {"difference": module.difference, "programs": programs}


def surveyed(
    view: View, found: list[Site], program: str | None = None, overridden: Collection[fx.Node] = ()
) -> dict[str, Any]:
    """One program of a survey.

    Args:
        view: the program's graphs, and ``found`` their sites.
        program: "train" or "eval" if it is one of two.
        overridden: nodes of sites that an override puts where they are.

    Returns:
        - ``program``: "train", "eval" or None, as given.
        - ``sites``: in graph order, each with ``op``, ``family``, ``owner`` (dotted path, "" for the root), ``mode``
          ("train", "eval"; None if it has none), ``held_by`` ("flag", "literal", "hard-coded", "kept", "override"),
          ``inverted`` (in train when its flag says eval), ``modeless`` (computes the same in both modes), ``literals``
          (p, or momentum and eps), ``limits`` ("train" or "eval", and why it can't be put there), and ``codes``, those
          of these reasons in the catalogue ("" for one that an older release has noted in the program).
        - ``totals``: how many sites of each family.
        - ``remarks``: what may depend on mode and is no site, a line each.
    """
    return {
        "program": program,
        "sites": [_described(site, site.node in overridden) for site in found],
        "totals": dict(sorted(Counter(site.op.family for site in found).items())),
        "remarks": _remarks(view, found),
    }


def as_text(survey: Mapping[str, Any]) -> str:
    """A survey as :func:`explain` shows it."""
    parts = []
    for program in survey["programs"]:
        lines = [_table(program)] if program["sites"] else ["no mode-dependent sites"]
        title = [f"the program of {program['program']} mode:"] if program["program"] else []
        parts.append("\n".join([*title, *lines, *program["remarks"]]))
    if survey["difference"] is not None:
        parts.insert(0, f"two programs, which differ in {survey['difference']}")
    return "\n\n".join(parts)


def overriding(found: Iterable[Site]) -> list[str]:
    """Classes with a ``train()`` of their own above sites in eval, which it may be that keeps them there."""
    classes = {kind for site in found if site.training is False for kind in module_classes(site.node)}
    return sorted(kind.__qualname__ for kind in classes if kind is not None and kind.train is not nn.Module.train)


def _table(program: Mapping[str, Any]) -> str:
    rows = []
    for site in program["sites"]:
        literals = ", ".join(f"{name}={value}" for name, value in site["literals"].items())
        codes = {mode: f" ({code})" if code else "" for mode, code in site["codes"].items()}
        limits = [f"not to {mode}{codes[mode]}: {why}" for mode, why in site["limits"].items()]
        limits = ["the same computation in both modes"] if site["modeless"] else limits
        held_by = site["held_by"] + (", inverted" if site["inverted"] and site["held_by"] == "flag" else "")
        rows.append((site["op"], site["owner"] or "(root)", site["mode"] or "-", held_by, literals, "; ".join(limits)))
    totals = ", ".join(f"{n} {family}" for family, n in program["totals"].items())
    head = ("op", "owner", "mode", "held by", "literals", "limits")
    return f"{console.table(head, rows)}\n{len(rows)} sites: {totals}"


def _described(site: Site, overridden: bool) -> dict[str, Any]:
    reasons = {mode: messages.parted(why) for mode, t in MODES.items() if (why := site.refusal(t))}
    return {
        "op": str(site.op),
        "family": site.op.family,
        "owner": site.owner,
        "mode": {True: "train", False: "eval", None: None}[site.training],
        "held_by": "override" if overridden else _held_by(site),
        "inverted": site.inverted,
        "modeless": site.modeless,
        "literals": _branches(site) if site.op.family == "switch" else _literals(site),
        "limits": {mode: text for mode, (_, text) in reasons.items()},
        "codes": {mode: code for mode, (code, _) in reasons.items()},
    }


def _literals(site: Site) -> dict[str, Any]:
    return {name: _plain(value) for name, value in site.literals.items()}


def _branches(site: Site) -> dict[str, Any]:
    """What each branch of a switch does: how many ops, and the buffers that it writes."""
    return dict(zip(("train", "eval"), map(_does, site.body.view.run_by(site.node)), strict=True))


def _does(body: Body) -> str:
    ops, written = 0, set()
    pending = [body]
    while pending:
        body = pending.pop()
        for node in body.graph.nodes:
            inner = body.view.run_by(node) if node.op == "call_function" else []
            pending += inner
            ops += node.op == "call_function" and not inner and node.target is not operator.getitem
            written.update(_written(body, node))
    writes = f", writes {', '.join(sorted(written))}" if written else ""
    return f"{ops} ops{writes}" if ops else "nothing"


def _held_by(site: Site) -> str:
    if site.bound:
        return "flag"
    return "hard-coded" if site.hard_coded else "kept" if note(site.node).get("mode") == KEPT else "literal"


def _plain(value: Any) -> Any:
    """A literal as JSON can hold it; one that the graph computes by its name."""
    return value if isinstance(value, float | int | None) else str(value)


def _remarks(view: View, found: list[Site]) -> list[str]:
    known = _known(found)
    lines: list[str] = list(getattr(view.root, "meta", {}).get(REMARKS, ()))
    lines += [messages.NOT_CALLED.reason(kind=name) for name in overriding(found)]
    lines += [messages.MAY_BE_ONE.reason(site=site) for site in found if reused(site)]
    for body in view.bodies:
        if body.gated:
            continue
        for node in samplers(body):
            if node not in known and node.target not in _compat.UNCONDITIONAL_HOPS:
                lines.append(messages.DRAWS.reason(op=node.target, owner=view.owner[node]))
    writes = beside(view, found)
    return lines + [messages.WRITES.reason(op=n.target, path=path, owner=view.owner[n]) for n, path in writes]


def beside(view: View, found: Iterable[Site]) -> list[tuple[fx.Node, str]]:
    """The nodes that write to buffers in both modes and are no part of a site, with the paths of the buffers."""
    known, writes = _known(found), []
    for body in view.bodies:  # callers first
        if body.caller in known:
            known.update(body.graph.nodes)
        for node in body.graph.nodes if not body.gated else ():
            if node not in known and lookup(node.target) is None:
                writes += [(node, path) for path in _written(body, node)]
    return writes


def _known(found: Iterable[Site]) -> set[fx.Node]:
    """All nodes that belong to sites."""
    parts = (part for site in found for part in (site.node, site.step, *(site.region.nodes if site.region else ())))
    return {part for part in parts if part is not None}


def _written(body: Body, node: fx.Node) -> list[str]:
    """The paths of the buffers that a node writes to."""
    state = body.view.state
    operands = [value for item in written_operands(node) if isinstance(value := viewed(item), fx.Node)]
    return [path for value in operands if (path := state[value]) is not None]


def graph_text(root: nn.Module) -> str:
    """All graphs of a module: the root's first, and below it those of its regions and branches.

    Parameters, buffers, constants and flags stand under their paths, inputs and results under the names of their nodes.
    Types, device and memory formats are left out.
    """
    return "\n\n".join("\n".join(_lines(body)) for body in View(root).bodies)


def _lines(body: Body) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    inputs = body.graph.find_nodes(op="placeholder")
    for node in body.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "get_attr":
            names[node] = str(node.target) if is_flag(node) else body.view.state[node] or str(node.target)
        else:
            names[node] = node.name
    yield f"{body.path or 'forward'}({', '.join(names[node] for node in inputs)}):"
    for node in body.graph.nodes:
        if node.op == "output":
            yield f"    return {_shown(node.args[0], names)}"
        elif node.op not in ("placeholder", "get_attr") and node.target != _compat.GUARDS:
            operands = [_shown(value, names) for value in node.args]
            operands += [f"{name}={_shown(value, names)}" for name, value in node.kwargs.items()]
            owner = body.view.owner[node]
            yield f"    {node.name} = {_target(node)}({', '.join(operands)})" + (f"  # {owner}" if owner else "")


def _shown(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_shown(item, names) for item in value) + ("," if len(value) == 1 else "") + ")"
    return str(value)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str | OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
