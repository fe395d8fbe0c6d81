"""This package's own operator in terms of ATen, for programs that others read."""

from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import _compat
from compile_modes.bodies import Body, bodies, own
from compile_modes.capture import trace_in_place_of
from compile_modes.cumulative import CUMULATIVE_BATCH_NORM, cumulative_batch_norm
from compile_modes.lifting import relift
from compile_modes.ops import lookup


def spelled_out(program: ExportedProgram) -> ExportedProgram:
    """A program without this package's own operator; the program itself if it has none."""
    if not any(_calls(body) for body in bodies(program.graph_module)):
        return program
    root = program.module()
    own(root)
    spell_out(root)
    return relift(root, program)


def spell_out(root: nn.Module) -> None:
    """Puts what it computes, in ATen, into the place of each call of this package's operator."""
    for body in bodies(root):
        nodes = _calls(body)
        for node in nodes:
            _replace(node)
        if nodes:
            _compat.refresh(body.module)


def _replace(node: fx.Node) -> None:
    operands, row = node.all_input_nodes, lookup(node.target)
    assert row is not None
    arguments = {name: row.read(node.args, dict(node.kwargs), name) for name in row.arguments}

    def call(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        return cumulative_batch_norm(**fx.map_arg(arguments, given.__getitem__))

    traced = trace_in_place_of(node, call, [_compat.value(operand) for operand in operands])
    inputs = traced.graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        result: Any = node.graph.graph_copy(traced.graph, dict(zip(inputs, operands, strict=True)))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _calls(body: Body) -> list[fx.Node]:
    return list(body.graph.find_nodes(op="call_function", target=CUMULATIVE_BATCH_NORM))
