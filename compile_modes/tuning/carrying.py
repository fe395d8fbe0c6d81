"""Values that new nodes need: state read from wherever a graph stands, and the fake values of new nodes."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import fx, nn

from compile_modes import _compat
from compile_modes._compat.tracing import faking
from compile_modes.graph.edits import attr_node
from compile_modes.graph.flags import is_flag
from compile_modes.graph.owners import join
from compile_modes.graph.view import Body, attribute


def can_carry(body: Body) -> bool:
    """Whether a graph can read state of the root: by an attribute, or as an operand of the one call that runs it."""
    if body.parent is None or body.caller is None or body.caller.op == "call_module":
        return True
    target = body.path.removeprefix(body.parent.path).lstrip(".")
    runs = [n for n in body.parent.graph.find_nodes(op="get_attr") if n.target == target for n in n.users]
    return body.caller.target in _compat.UNCONDITIONAL_HOPS and len(runs) == 1 and can_carry(body.parent)


def carried(body: Body, path: str, edited: set[nn.Module]) -> fx.Node:
    """The node that stands for a parameter in a graph; an operand more of the call that runs it, where need be.

    Args:
        body: the graph, of which :func:`can_carry` holds.
        path: where the parameter is, from the root.
        edited: takes the modules whose graphs are edited beside that of ``body``.
    """
    local = path.removeprefix(f"{body.path}.") if body.path else path
    if (local != path or not body.path) and attribute(body.module, local) is not None:
        return _valued(attr_node(body, local), body, path)
    known = body.view.inputs[body]
    if path not in known:
        assert body.parent is not None
        assert body.caller is not None
        operand = carried(body.parent, path, edited)
        edited.add(body.parent.module)
        with body.graph.inserting_after(body.inputs[-1]) if body.inputs else body.graph.inserting_before():
            placeholder = body.graph.placeholder(path.replace(".", "_"))
        body.view.head.pop(body.graph, None)
        body.caller.args = (*body.caller.args, operand)
        body.operands[placeholder] = operand
        placeholder.meta = {"val": operand.meta["val"]} if "val" in operand.meta else {}
        known[path] = placeholder
    return known[path]


def let_go(body: Body, gone: Collection[str]) -> set[nn.Module]:
    """Takes out operands and reads of state and flags that nothing uses any more; returns the modules that it edits.

    Args:
        body: the graph; those around it are seen to as well.
        gone: paths of modules; what is below any other one stays.
    """

    def goes(path: str | None) -> bool:
        return path is not None and any(path.startswith(f"{module}.") for module in gone)

    edited: set[nn.Module] = set()
    if body.parent is not None and body.caller is not None and body.caller.op == "call_function":
        for placeholder in reversed(body.inputs):
            operand = body.operands.get(placeholder)
            if not placeholder.users and isinstance(operand, fx.Node) and goes(body.view.state[operand]):
                args = list(body.caller.args)
                del args[len(args) - len(body.inputs) + body.inputs.index(placeholder)]
                body.caller.args = tuple(args)
                body.graph.erase_node(placeholder)
                edited |= {body.module, body.parent.module}
        edited |= let_go(body.parent, gone)
    for node in list(body.graph.find_nodes(op="get_attr")):
        if not node.users and goes(join(body.path, str(node.target))):
            body.graph.erase_node(node)
            edited.add(body.module)
    return edited


def computed(node: fx.Node, body: Body) -> Any:
    """What a new call returns for the fake tensors that its operands stand for; None where they stand for nothing."""
    operands = {n: True if is_flag(n) else _compat.value(n) for n in node.all_input_nodes}
    if any(value is None for value in operands.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
    with faking(_fake_in(body)), _casting(body):
        return cast(Any, node.target)(*args, **kwargs)


@contextlib.contextmanager
def _casting(body: Body) -> Iterator[None]:
    """The autocast regions that a graph stands in."""
    with contextlib.ExitStack() as stack:
        regions = []
        inner: Body | None = body
        while inner is not None:
            if inner.caller is not None and inner.caller.target is _compat.AUTOCAST:
                regions.append(inner.caller)
            inner = inner.parent
        for caller in reversed(regions):
            device, dtype, enabled, cache = cast(Any, caller.args[:4])
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=bool(cache)))
        yield


def _valued(node: fx.Node, body: Body, path: str) -> fx.Node:
    """Gives a read of a parameter a fake value."""
    if "val" not in node.meta and (value := fake_of(attribute(body.view.root, path), body)) is not None:
        node.meta["val"] = value
    return node


def fake_of(tensor: torch.Tensor, body: Body) -> Any:
    """The fake tensor that stands for a parameter or buffer, in the mode of those in a graph; None if it has none."""
    fake = _fake_in(body)
    return None if fake is None else fake.fake_mode.from_tensor(tensor, static_shapes=True)


def _fake_in(body: Body) -> Any:
    """One of the fake tensors of a graph; None if it has none."""
    values = (node.meta.get("val") for node in body.graph.nodes)
    return next((value for value in values if isinstance(value, _compat.FakeTensor)), None)
