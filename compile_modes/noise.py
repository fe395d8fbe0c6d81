"""Dropouts that have no kernel: their decomposition draws noise and multiplies, in several nodes that know no mode."""

from typing import cast

from torch import fx, nn

from compile_modes import _compat
from compile_modes.bodies import module_class
from compile_modes.ops import DRAW, TABLE


def is_draw(node: fx.Node) -> bool:
    """Whether a node draws the noise of a decomposed dropout module."""
    return node.target == DRAW and issubclass(module_class(node) or object, _compat.DROPOUT)


def whole_dropout(draw: fx.Node) -> fx.Node | None:
    """Rewrites what is left of a feature or alpha dropout module, whose noise is drawn by ``draw``; None if of none.

    Only inside torch's own modules: elsewhere the same ops may be a mask of the model's own.
    """
    kind = module_class(draw)
    row = next((r for r in TABLE.values() if any(getattr(nn, name) is kind for name in r.modules)), None)
    parts = [draw]
    while row is not None and len(parts) < len(row.parts):
        parts.append(parts[-1].next)
    if row is None or [node.target for node in parts] != row.part_targets:
        return None
    *inner, last = parts
    inputs = {a for node in parts[1:] for a in node.all_input_nodes} - set(inner)
    if len(inputs) != 1 or any(user not in parts for node in inner for user in node.users):
        return None
    keep = cast(float, draw.args[1])
    p = round(1 - keep, 12) if 1 - round(1 - keep, 12) == keep else 1 - keep  # 0.3, not 0.30000000000000004
    with last.graph.inserting_before(draw):
        whole = last.graph.call_function(row.overload, (inputs.pop(), p, True))
    whole.meta = dict(last.meta)
    last.replace_all_uses_with(whole)
    shape = draw.all_input_nodes
    for node in reversed(parts):
        node.graph.erase_node(node)
    for node in shape:
        if not node.users and node.op == "call_function":
            node.graph.erase_node(node)
    return whole
