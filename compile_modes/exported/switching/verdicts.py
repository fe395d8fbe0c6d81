"""What the exports of a model say of the mode of each op: whose flag it follows, if any."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compile_modes.exported.switching.aligning import probability
from compile_modes.exported.switching.traces import Graph, Op, Unmatched, Vector, ancestors
from compile_modes.graph.ops import ModeOp, lookup
from compile_modes.graph.owners import module_path
from compile_modes.graph.view import attribute


@dataclass
class Verdict:
    """What exports say of the mode of one node: "bound", "inverted", "fixed", or nothing; whose flag it follows."""

    how: str = ""
    owner: str = ""
    p: float | None = None
    varied: bool = False
    literal: bool = False

    def mode(self, vector: Vector) -> bool:
        return self.literal if self.how in ("", "fixed") else vector(self.owner) is not (self.how == "inverted")


@dataclass
class Decision:
    """The verdict on an op, and on the sites in the bodies that it runs as they stand."""

    verdict: Verdict
    inner: list[tuple[fx.Node, Verdict]] = field(default_factory=list)


def decided(ops: Iterator[Op], readers: Collection[str] = ()) -> Iterator[tuple[Op, Decision]]:
    """What all exports together say of the modes of ops: they follow modules around them, or else one of ``readers``.

    Raises:
        Unmatched: a mode follows no flag of the modules around it.
    """
    for op in ops:
        seen = [(vector, node) for vector, node, _ in op.seen]
        verdict = _verdict(seen, op.owner, readers)
        inner = []
        if any(isinstance(a, Graph) for a in op.args):
            runs = [(vector, list(_body_sites(op, node))) for vector, node in _bodies_seen(op)]
            for i, (site, _) in enumerate(runs[-1][1]):
                inner.append((site, _verdict([(v, found[i][0]) for v, found in runs], module_path(site), readers)))
        if verdict.how or inner or op.row is not None:
            yield op, Decision(verdict, inner)


def _verdict(seen: Sequence[tuple[Vector, fx.Node]], owner: str, readers: Collection[str]) -> Verdict:
    row = lookup(seen[-1][1].target)
    if row is None or row.modeless:
        return Verdict()
    literals = [literal(row, node) for _, node in seen]
    if any(mode is None for mode in literals) or (row.flag is None and not any(literals)):
        return Verdict(literal=bool(literals[-1]))
    varied, last = len(set(literals)) > 1, bool(literals[-1])
    probabilities = [p for _, node in seen if (p := probability(node))]
    names = [*ancestors(owner), *sorted(readers)] if varied else [owner]
    for how, same in (("bound", True), ("inverted", False)):
        for name in names if varied or same else ():
            if all((vector(name) is mode) is same for (vector, _), mode in zip(seen, literals, strict=True)):
                return Verdict(how, name, probabilities[-1] if probabilities else None, varied, last)
    if varied:
        raise Unmatched(f"the mode of {row} (owner {owner!r}) follows none of the modules around it")
    return Verdict("fixed", owner, None, varied, last)


def literal(row: ModeOp, node: fx.Node) -> bool | None:
    if row.flag is None:
        p = row.read(node.args, dict(node.kwargs), row.p) if row.p is not None else None
        return p > 0 if isinstance(p, int | float) else None
    value = row.read(node.args, dict(node.kwargs), row.flag)
    return value if isinstance(value, bool) else None


def _bodies_seen(op: Op) -> Iterator[tuple[Vector, fx.Node]]:
    return ((vector, node) for vector, node, _ in op.seen)


def _body_sites(op: Op, node: fx.Node) -> Iterator[tuple[fx.Node, ModeOp]]:
    """The sites in the bodies that a call runs, at any depth."""

    def visit(module: Any, call: fx.Node) -> Iterator[tuple[fx.Node, ModeOp]]:
        for held in (attribute(module, str(n.target)) for n in call.all_input_nodes if n.op == "get_attr"):
            if isinstance(held, fx.GraphModule):
                for inner in held.graph.nodes:
                    if inner.op == "call_function":
                        if (row := lookup(inner.target)) is not None:
                            yield inner, row
                        yield from visit(held, inner)

    yield from visit(node.graph.owning_module, node)
