"""Which ops of two programs are one: those that differ in nothing but their mode."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from torch import fx, nn

from compile_modes.exported.switching.traces import Graph, Held, Op, map_values
from compile_modes.graph.ops import lookup
from compile_modes.graph.view import attribute


def align(first: list[Op], second: list[Op]) -> list[tuple[bool, list[Op], list[Op]]]:
    """Two sequences of ops as stretches: equal ones, op by op, and others.

    Any alignment is right, as long as values that differ are looked after; a good one leaves little that differs.
    """
    keys = [[_key(op) for op in ops] for ops in (first, second)]
    start = next((i for i, (a, b) in enumerate(zip(*keys, strict=False)) if a != b), min(map(len, keys)))
    matcher = SequenceMatcher(None, keys[0][start:], keys[1][start:], autojunk=False)
    found = [(True, first[:start], second[:start])] if start else []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        found.append((tag == "equal", first[start + i1 : start + i2], second[start + j1 : start + j2]))
    return [piece for stretch in found for piece in _compatible(*stretch)]


def _compatible(equal: bool, first: list[Op], second: list[Op]) -> Iterator[tuple[bool, list[Op], list[Op]]]:
    """Parts a stretch where an op has two probabilities, which no flag can choose between."""
    if not equal:
        yield False, first, second
        return
    begin = 0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        p, q = (probability(op.node) for op in (a, b))
        if p and q and p != q:
            if begin < i:
                yield True, first[begin:i], second[begin:i]
            yield False, [a], [b]
            begin = i + 1
    if begin < len(first):
        yield True, first[begin:], second[begin:]


def probability(node: fx.Node) -> Any:
    """The probability of an op whose mode is nothing else."""
    row = lookup(node.target)
    return row.read(node.args, dict(node.kwargs), str(row.p)) if row is not None and row.flag is None and row.p else 0


def _key(op: Op) -> str:
    """What two ops have in common that differ in nothing but their mode and what their values are called."""
    arguments = map_values((op.args, op.kwargs), _named)
    row = op.row
    if row is not None and (mode := row.flag or row.p) is not None:
        args, kwargs = list(arguments[0]), dict(arguments[1])
        if row.index(mode) < len(args):
            args[row.index(mode)] = None
        kwargs.pop(mode, None)
        arguments = args, kwargs
    bodies = [_text(a.module) for a in op.args if isinstance(a, Graph)]
    shown = [a for a in arguments[0] if not isinstance(a, Graph)]
    return repr((str(op.node.target), op.owner, shown, arguments[1], op.context, bodies))


def _named(value: Any) -> str:
    """Parameters and constants by what they are; buffers not, for a model may work on a copy in one mode."""
    named = isinstance(value, Held) and (value.key[0] == "constant" or isinstance(value.value, nn.Parameter))
    return f"{value.key}" if named else "?"


def _text(module: fx.GraphModule) -> str:
    """The graph of a body without the modes in it."""
    lines = []
    for node in module.graph.nodes:
        row = lookup(node.target) if node.op == "call_function" else None
        mode = row.index(row.flag) if row is not None and row.flag else -1
        lines.append(f"{node.name} {node.target} {[str(a) for i, a in enumerate(node.args) if i != mode]}")
        held = attribute(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            lines.append(_text(held))
    return "\n".join(lines)
