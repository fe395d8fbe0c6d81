"""From the edited module of a program back to a program: the reverse of ``ExportedProgram.module()``.

Others read such programs, so this package's own operator is put into terms of ATen in them.
"""

import copy
import operator
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from compile_modes import _compat, messages
from compile_modes._compat import pt2, tracing
from compile_modes.errors import first_line
from compile_modes.graph.cumulative import CUMULATIVE_BATCH_NORM, cumulative_batch_norm
from compile_modes.graph.edits import OWNED, own
from compile_modes.graph.ops import lookup
from compile_modes.graph.view import Body, View, attribute

_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def relift(
    root: nn.Module,
    program: ExportedProgram,
    changed: Collection[fx.Node] = (),
    *,
    added: Mapping[str, torch.Tensor] | None = None,
    unsaved: Collection[str] = (),
    removed: Collection[str] = (),
    gone: str = "",
) -> ExportedProgram:
    """The program that an edited module stands for, in training IR.

    Inputs keep their names, their order and what is known of them (dynamic sizes among it), outputs their structure.
    State is taken from ``program``. A value that the graph writes into state or an input at its end, as graphs below
    training IR do, is written in place.

    Args:
        root: the module of ``program.module()``, edited, with bodies of its own. These become the program's.
        program: the program.
        changed: nodes of ``root`` whose results may have another layout than before.
        added: parameters and buffers that the program doesn't have, by name.
        unsaved: those of them that are buffers without a place in its ``state_dict``.
        removed: parameters and buffers of the program that nothing in ``root`` reads any more.
        gone: path of a module that the program had; nothing is known any more of how it was called.

    Raises:
        BindError: the result would be no valid program.
    """
    lift = _Lift(root, program, changed, added or {}, unsaved, removed)
    checks = program.verifiers if program.dialect == "TRAINING" else [pt2.TrainingIRVerifier]
    try:
        lifted = ExportedProgram(
            lift.bodies,
            lift.graph,
            ExportGraphSignature(lift.inputs, lift.outputs),
            lift.state,
            dict(program.range_constraints),
            [entry for entry in lift.call_graph() if not gone or not f"{entry.fqn}.".startswith(f"{gone}.")],
            program.example_inputs,
            lift.constants,
            verifiers=checks,
        )
    except pt2.SpecViolationError as error:
        raise messages.NO_VALID_PROGRAM.error(error=first_line(error)) from error
    pt2.keep_guards(lifted, program)
    return lifted


class _Lift:
    """Builds the graph of a program from that of its module."""

    def __init__(
        self,
        root: nn.Module,
        program: ExportedProgram,
        changed: Collection[fx.Node],
        added: Mapping[str, torch.Tensor],
        unsaved: Collection[str],
        removed: Collection[str],
    ) -> None:
        self.root, self.program, self.changed = root, program, changed
        self._new, self._unsaved, self._removed = added, unsaved, removed
        self.state = {n: t for n, t in program.state_dict.items() if n not in removed}
        self.state |= {n: t for n, t in added.items() if n not in unsaved}
        self.graph = fx.Graph()
        self.bodies: dict[str, nn.Module] = {}
        self.inputs: list[InputSpec] = []
        self.outputs: list[OutputSpec] = []
        self.constants = {n: c for n, c in program.constants.items() if n not in removed}
        self.constants |= {n: added[n] for n in unsaved}
        fakes = (node.meta.get("val") for node in program.graph.nodes)
        self._mode: Any = next((fake.fake_mode for fake in fakes if isinstance(fake, _compat.FakeTensor)), None)
        self._held: dict[str, fx.Node] = {}  # placeholders of state and constants, by path
        self._copies: dict[fx.Node, fx.Node] = {}
        self._stale: set[fx.Node] = set()
        old = cast(fx.Graph, root.graph)
        self._place_inputs(old)
        for node in old.nodes:
            if node.op == "output":
                self._place_outputs(node)
            elif node.op != "placeholder" and node.target != _compat.GUARDS:
                self._copies[node] = self._get_attr(node) if node.op == "get_attr" else self._call(node)

    def _place_inputs(self, old: fx.Graph) -> None:
        inputs = iter(old.find_nodes(op="placeholder"))
        parameters = [(n, t) for n, t in self._new.items() if isinstance(t, nn.Parameter)]
        added = [(n, t) for n, t in self._new.items() if not isinstance(t, nn.Parameter)] + self._added(old)
        place = self.program.graph.find_nodes(op="placeholder")
        for node, spec in zip(place, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.TOKEN:
                continue  # the module's graph has none
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in self._removed:
                continue
            if spec.kind is not InputKind.PARAMETER:
                while parameters:
                    self._add(*parameters.pop(0))
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                while added:
                    self._add(*added.pop(0))
            copied = self._placeholder(node.name, node)
            self.inputs.append(copy.deepcopy(spec))
            if spec.kind is InputKind.USER_INPUT:
                self._copies[next(inputs)] = copied
            else:
                self._held[str(spec.target)] = copied
        for name, value in parameters + added:
            self._add(name, value)

    def _placeholder(self, name: str, like: fx.Node | None = None) -> fx.Node:
        node = self.graph.create_node("placeholder", name, name=name)
        if like is not None:
            # Names that Python has taken ("input") are given by export all the same, past fx's own check.
            node.name, node.meta = like.name, dict(like.meta)
        node.target = node.name if like is None else like.target
        return node

    def _added(self, old: fx.Graph) -> list[tuple[str, torch.Tensor]]:
        """What only the edited graph reads: counters that a strict eval export drops, constants of the other mode."""
        state, known = self.program.state_dict, {spec.target for spec in self.program.graph_signature.input_specs}
        known |= self._new.keys()
        held = {id(constant) for constant in self.program.constants.values()}
        read = dict.fromkeys(str(node.target) for node in old.find_nodes(op="get_attr"))
        values = {name: attribute(self.root, name) for name in read if name not in known}
        constants = {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and id(v) not in held}
        found = [(name, state[name]) for name in values if name in state]
        return found + [(name, value) for name, value in constants.items() if name not in state]

    def _add(self, name: str, value: torch.Tensor) -> None:
        kind, start, persistent = InputKind.CONSTANT_TENSOR, "c_", None
        if isinstance(value, nn.Parameter):
            kind, start = InputKind.PARAMETER, "p_"
        elif name in self.state or name in self._unsaved:
            kind, start, persistent = InputKind.BUFFER, "b_", name not in self._unsaved
        else:
            self.constants[name] = value
        node = self._placeholder(start + name.replace(".", "_"))
        node.meta["val"] = self._mode.from_tensor(value, static_shapes=True)
        self.inputs.append(InputSpec(kind, TensorArgument(node.name), name, persistent=persistent))
        self._held[name] = node

    def _get_attr(self, node: fx.Node) -> fx.Node:
        path = str(node.target)
        value = attribute(self.root, path)
        if isinstance(value, nn.Module):
            self.bodies[path] = value
            for body in value.modules():  # the program's from now on, and not to be edited by whoever gets its module
                getattr(body, "meta", {}).pop(OWNED, None)
            return self.graph.node_copy(node)
        if path not in self._held:  # a constant that two programs have under one name moves, see hoist_constants()
            same = (name for name, constant in self.program.constants.items() if constant is value)
            path = next((name for name in same if name in self._held), path)
        if path not in self._held:
            raise messages.FOREIGN_VALUE.error(path=path)
        return self._held[path]

    def _call(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, self._copies.__getitem__)
        copied.meta.pop("from_node", None)  # speaks of the module's graph
        foreign = any(self._is_foreign(value) for value in pytree.tree_leaves(copied.meta.get("val")))
        stale = node in self.changed or any(n in self._stale for n in copied.all_input_nodes)
        if "val" not in copied.meta or stale or foreign:
            before = copied.meta.get("val")
            result = pytree.tree_map(self._adopted, _computed(copied))
            if "val" not in copied.meta or foreign or _layout(result) != _layout(before):
                copied.meta["val"] = result
                copied.meta.pop("tensor_meta", None)
                self._stale.add(copied)
        return copied

    def _is_foreign(self, value: Any) -> bool:
        """Whether a fake tensor comes from the trace of another program, as those of a switch's branch may."""
        return isinstance(value, _compat.FakeTensor) and value.fake_mode is not self._mode

    def _adopted(self, value: Any) -> Any:
        if not self._is_foreign(value):
            return value
        with self._mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def _place_outputs(self, node: fx.Node) -> None:
        values: Any = node.args[0]
        specs = [s for s in self.program.graph_signature.output_specs if s.kind not in (*_MUTATIONS, OutputKind.TOKEN)]
        if len(specs) != len(values) or any(spec.kind is not OutputKind.USER_OUTPUT for spec in specs):
            raise messages.RETURNS_MORE.error()
        returned = [self._copies[v] if isinstance(v, fx.Node) else v for v in values]
        for spec, value in zip(specs, returned, strict=True):
            arg = copy.deepcopy(spec.arg)
            if isinstance(value, fx.Node):
                arg.name = value.name
            self.outputs.append(OutputSpec(spec.kind, arg, spec.target))
        self.graph.output(tuple(returned)).meta = dict(node.meta)

    def call_graph(self) -> Any:
        """The program's; without signatures of modules (``preserve_module_call_signature``) whose values are gone."""
        entries = copy.deepcopy(self.program.module_call_graph)
        names = {node.name for node in self.graph.nodes}
        for entry in entries:
            arguments = [*entry.signature.inputs, *entry.signature.outputs] if entry.signature is not None else []
            if any(getattr(argument, "name", "") and argument.name not in names for argument in arguments):
                entry.signature = None
        return entries


def _computed(node: fx.Node) -> Any:
    """What a call returns for the fake tensors that its operands stand for."""
    if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
        return node.meta.get("val")  # a region's body was traced with the layouts of before; tracers make new ones
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    with torch.no_grad():
        return cast(Any, node.target)(*args, **kwargs)


def _layout(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_layout(item) for item in value]
    return (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else None


def spelled_out(program: ExportedProgram) -> ExportedProgram:
    """A program without this package's own operator; the program itself if it has none."""
    if not any(_calls(body) for body in View(program.graph_module).bodies):
        return program
    root = program.module()
    own(View(root))
    spell_out(root)
    return relift(root, program)


def spell_out(root: nn.Module) -> None:
    """Puts what it computes, in ATen, into the place of each call of this package's operator."""
    for body in View(root).bodies:
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

    traced = tracing.trace_in_place_of(node, call, [_compat.value(operand) for operand in operands])
    inputs = traced.graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        result: Any = node.graph.graph_copy(traced.graph, dict(zip(inputs, operands, strict=True)))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _calls(body: Body) -> list[fx.Node]:
    return list(body.graph.find_nodes(op="call_function", target=CUMULATIVE_BATCH_NORM))
