"""A program's sites as text."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from compile_modes import _compat
from compile_modes.bodies import Body, bodies, module_classes, module_path, state_path
from compile_modes.dual import DualModule
from compile_modes.ops import lookup
from compile_modes.regions import samplers
from compile_modes.sites import REMARKS, Site, graph_root, note, sites


def explain(obj: Any) -> str:
    """A table of the sites of ``obj``: op, owner, mode, literals, and each switch that isn't possible, with the reason.

    Below it stands what may depend on mode although nothing in the program says so: random numbers that are drawn, and
    buffers that are written, in both modes.

    Takes what :func:`sites` takes and raises what it raises.
    """
    module = getattr(obj, "_orig_mod", obj)
    if isinstance(module, DualModule):
        parts = [f"in {name} mode:\n{explain(module.program(name == 'train'))}" for name in ("train", "eval")]
        return "\n\n".join([f"two programs, which differ in {module.difference}", *parts])
    root = graph_root(module)  # once: each call of a program's module() makes other nodes
    found = sites(root)
    lines = _table(found) if found else ["no mode-dependent sites"]
    return "\n".join(lines + _remarks(root, found))


def reused(site: Site) -> bool:
    """Whether users of a dropout exported in eval may have been users of its input: the two are one tensor there."""
    first = site.op.family == "dropout" and site.training is False and not site.bound and len(site.node.users) > 1
    return first or bool(note(site.node).get("reused"))


def overriding(found: Iterable[Site]) -> list[str]:
    """Classes with a ``train()`` of their own above sites in eval, which it may be that keeps them there."""
    classes = {kind for site in found if site.training is False for kind in module_classes(site.node)}
    return sorted(kind.__qualname__ for kind in classes if kind is not None and kind.train is not nn.Module.train)


def _table(found: list[Site]) -> list[str]:
    rows = [("op", "owner", "mode", "held by", "literals", "limits")]
    rows += [(str(s.op), s.owner or "(root)", *_described(s)) for s in found]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = Counter(s.op.family for s in found)
    lines.append(f"{len(found)} sites: " + ", ".join(f"{n} {family}" for family, n in sorted(total.items())))
    return lines


def _remarks(root: nn.Module, found: list[Site]) -> list[str]:
    known = {node for site in found for node in (site.node, site.step, *(site.region.nodes if site.region else ()))}
    lines: list[str] = list(getattr(root, "meta", {}).get(REMARKS, ()))
    lines += [f"not called: train() of {name}, which overrides nn.Module's" for name in overriding(found)]
    lines += [
        f"exported in eval: users of the input of {s} may stand as users of its result" for s in found if reused(s)
    ]
    for body in bodies(root):
        if body.gated:
            continue
        for node in samplers(body):
            if node not in known and node.target not in _compat.UNCONDITIONAL_HOPS:
                lines.append(f"in both modes: {node.target} draws random numbers (owner {module_path(node)!r})")
        for node in body.graph.nodes:
            for path in _written(body, node) if node not in known and lookup(node.target) is None else ():
                lines.append(f"in both modes: {node.target} writes the buffer {path!r} (owner {module_path(node)!r})")
    return lines


def _written(body: Body, node: fx.Node) -> list[str]:
    """The paths of the buffers that a node writes to."""
    if not isinstance(node.target, OpOverload):
        return []
    arguments = node.target._schema.arguments
    operands = [*node.args, *(None for _ in arguments[len(node.args) :])]
    values = [node.kwargs.get(a.name, operand) for a, operand in zip(arguments, operands, strict=True)]
    written = [v for a, v in zip(arguments, values, strict=True) if a.alias_info is not None and a.alias_info.is_write]
    return [path for value in written if (path := state_path(body, value)) is not None]


def _described(site: Site) -> tuple[str, str, str, str]:
    mode = {True: "train", False: "eval", None: "-"}[site.training]
    held = (
        "flag, inverted" if site.inverted else "flag" if site.bound else "hard-coded" if site.hard_coded else "literal"
    )
    literals = ", ".join(f"{name}={value}" for name, value in site.literals.items())
    limits = [f"not to {name}: {why}" for name, t in (("train", True), ("eval", False)) if (why := site.refusal(t))]
    if site.modeless:
        limits = ["the same computation in both modes"]
    return mode, held, literals, "; ".join(limits)
