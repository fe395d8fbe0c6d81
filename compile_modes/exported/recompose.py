"""Decomposed programs: what ``run_decompositions()`` has taken apart is put together again, where that means the same.

A decomposed train graph is functional: batch norm returns its new statistics, its counter's step is an ``add``, and
both are copied into the buffers at the end. No flag could switch that, and backward fails on it, for the copies
overwrite what autograd has saved. In training IR one op does it all.
"""

import copy
import heapq
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes.graph import calls
from compile_modes.graph.ops import STATS, ModeOp, lookup
from compile_modes.graph.owners import join
from compile_modes.graph.sites import add_note, note
from compile_modes.graph.view import Body, View, attribute

_COPY_ = torch.ops.aten.copy_.default
_ADD = torch.ops.aten.add.Tensor
_CAST = _compat.aten_overload("_to_copy")  # statistics in bfloat16 are computed in float32 and cast before the copy


@dataclass
class Recomposed:
    """What :func:`recompose` did.

    Attributes:
        view: the module as it is now.
        decomposed: whether the program is decomposed, as far as can be told.
        rebuilt: the nodes of training IR that stand in the place of decomposed ones now.
        refused: the batch norms that stay as they are, each with the reason.
    """

    view: View
    decomposed: bool
    rebuilt: list[fx.Node] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)
    _before: dict[nn.Module, fx.Graph] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Gives the modules back the graphs that they had."""
        for module, graph in self._before.items():
            module.graph = cast(Any, graph)
            _compat.refresh(module)


def recompose(view: View, program: torch.export.ExportedProgram | None = None) -> Recomposed:
    """Rewrites what is left of batch norms and dropouts in a decomposed graph into training IR, in place.

    A batch norm is rewritten if its statistics are buffers of the module, nothing but batch norms reads them once
    they have changed, and every change reaches the buffer: then updating them in place means the same. The steps of
    its counter are rewritten with it. Any other keeps its form, with the reason noted on it; in train it reads copies
    of its statistics from then on, so that backward works.

    Args:
        view: a module made of an exported program. If that wasn't decomposed, there is nothing to rewrite.
        program: the program itself, if at hand: it knows whether it is decomposed.
    """
    rows = {b: [(n, row) for n in b.graph.nodes if (row := lookup(n.target))] for b in view.bodies}
    # Programs know. A module is given away by the ops in it, but even a program of training IR may hold a few of those.
    hints = any(row.decomposed for found in rows.values() for _, row in found)
    done = Recomposed(view, program.dialect == "ATEN" if program is not None else hints)
    for body in view.bodies:
        apart = [_Apart.of(node, row) for node, row in rows[body] if row.whole]
        norms = [op for op in apart if any(op.operand(name) is not None for name in op.row.stats)]
        others = [op for op in apart if not op.row.stats and not op.obstacle()]
        if body.caller is not None and body.caller.op == "call_function":
            # A branch or a loop: its statistics are operands, and the body itself may be shared.
            done.refused += [(norm.node, f"it stands inside {body.caller.target}") for norm in norms]
        elif norms or others:
            done._before[body.module] = copy.deepcopy(body.graph)
            _norms(body, norms, done)
            done.rebuilt += _rebuild(others)
            _compat.refresh(body.module)
    if done._before:
        done.view = View(view.root)
    return done


@dataclass(eq=False)
class _Apart:
    """A decomposed op: its node, its mode, the nodes that take each output (by index), and its statistics' buffers."""

    node: fx.Node
    row: ModeOp
    training: Any
    outputs: dict[Any, list[fx.Node]]
    buffers: tuple[fx.Node, ...] = ()

    @classmethod
    def of(cls, node: fx.Node, row: ModeOp) -> "_Apart":
        mode = row.implied if row.flag is None else row.read(node.args, dict(node.kwargs), row.flag)
        outputs: dict[Any, list[fx.Node]] = {}
        for user in node.users:
            outputs.setdefault(user.args[1] if user.target is operator.getitem else None, []).append(user)
        return cls(node, row, mode, outputs)

    def operand(self, name: str) -> Any:
        return self.row.read(self.node.args, dict(self.node.kwargs), name)

    def new(self, name: str) -> list[fx.Node]:
        """The nodes that are the new value of a statistic."""
        index = self.row.new_state(name)
        return [] if index is None else self.outputs.get(index, [])

    def use(self, name: str) -> "_Use":
        in_place = self.row.new_state(name) is None
        return _Use(self.operand(name), self.new(name), bool(self.training), in_place)

    def obstacle(self) -> str:
        known = {0, *(self.row.new_state(name) for name in self.row.stats)} - {None}
        for item, users in self.outputs.items():
            if item not in known and (strange := [u for u in users if u.users or u.target is not operator.getitem]):
                return f"{strange[0].name} is read, which training IR does not return"
        return "" if isinstance(self.training, bool) else f"its {self.row.flag} is computed in the graph"


class _Use(NamedTuple):
    """What a node does with a buffer: the operand it reads, the nodes that are the next value, if it makes one."""

    operand: Any
    values: list[fx.Node]
    changes: bool
    in_place: bool = False


def _norms(body: Body, norms: list[_Apart], done: Recomposed) -> None:
    """Rewrites all decomposed batch norms of one graph; those on the same statistics together or not at all."""
    by_node = {norm.node: norm for norm in norms}
    reads: dict[int, list[fx.Node]] = {}
    for node in body.graph.find_nodes(op="get_attr"):
        reads.setdefault(id(body.view.held[node]), []).append(node)
    groups: dict[tuple[int, ...], _Group] = {}
    for norm in norms:
        found = [_buffer(body, norm.operand(name), by_node) for name in STATS]
        norm.buffers = tuple(node for node in found if node is not None)
        key = tuple(id(body.view.held[node]) for node in norm.buffers)
        if len(key) < len(STATS):
            key = (id(norm),)  # on its own, to be refused
        groups.setdefault(key, _Group(body, reads)).norms.append(norm)
    for group in groups.values():
        if why := group.obstacle():
            for norm in group.norms:
                done.refused.append((norm.node, why))
                _refuse(norm, why)
        else:
            done.rebuilt += group.rebuild()


def _buffer(body: Body, value: Any, norms: dict[fx.Node, _Apart]) -> fx.Node | None:
    """The ``get_attr`` of the buffer that ``value`` is, or is a later version of; None if it is anything else."""
    while isinstance(value, fx.Node) and value.op != "get_attr":
        node: fx.Node = value
        if node.target in (_COPY_, _CAST):
            value = node.args[0]
        elif node.target is operator.getitem and (norm := norms.get(cast(fx.Node, node.args[0]))) is not None:
            value = next((norm.operand(name) for name in STATS if node in norm.new(name)), None)
        else:
            return None
    held = body.view.held[value] if isinstance(value, fx.Node) else None
    return value if isinstance(held, torch.Tensor) else None


@dataclass(eq=False)
class _Group:
    """The decomposed batch norms of a graph that share their statistics, in the order in which they run."""

    body: Body
    reads: dict[int, list[fx.Node]]
    norms: list[_Apart] = field(default_factory=list)
    copies: list[fx.Node] = field(default_factory=list)
    steps: list[fx.Node] = field(default_factory=list)
    counter: fx.Node | None = None

    def obstacle(self) -> str:
        """Why updating the statistics in place would mean something else; ``""`` if it would not."""
        first = self.norms[0]
        if len(first.buffers) < len(STATS):
            return "its running statistics are no buffers of the module but computed in the graph"
        if why := next((why for norm in self.norms if (why := norm.obstacle())), ""):
            return why
        if not any(norm.training for norm in self.norms):  # nothing changes them, whoever else reads them
            read = all(norm.operand(name) in norm.buffers for norm in self.norms for name in STATS)
            return "" if read else "its running statistics have been changed before in the graph"
        uses = {norm.node: norm for norm in self.norms}
        for name, buffer in zip(STATS, first.buffers, strict=True):
            why = self._follow(buffer, lambda n, name=name: uses[n].use(name) if n in uses else None)  # type: ignore[misc]
            if why:
                return f"its {name} {why}"
        return self._follow_counter(str(first.buffers[0].target).rpartition(".")[0])

    def _follow_counter(self, home: str) -> str:
        tensor = attribute(self.body.module, join(home, "num_batches_tracked"))
        if id(tensor) not in self.reads:
            return ""
        self.counter, copies = self.reads[id(tensor)][0], len(self.copies)

        def step(node: fx.Node) -> _Use | None:
            if node.target is not _ADD or node.args[1:] != (1,) or node.kwargs:
                return None
            self.steps.append(node)
            return _Use(node.args[0], [node], True)

        why = self._follow(self.counter, step)
        if not self.steps:
            del self.copies[copies:]  # nothing counts here; whatever is done to the buffer is the model's own
            return ""
        return f"its num_batches_tracked {why}" if why else ""

    def _follow(self, buffer: fx.Node, use: Callable[[fx.Node], _Use | None]) -> str:
        """Compares, along the graph, what a buffer holds with what it would hold if each use updated it in place.

        Says how the two come apart, or notes the copies that become superfluous.
        """
        tensor = self.body.view.held[buffer]
        aliases = set(self.reads[id(tensor)])
        versions: dict[fx.Node, int] = {}
        held = updated = 0
        queue = sorted({user for alias in aliases for user in alias.users})
        while queue:
            node = heapq.heappop(queue)
            while queue and queue[0] is node:
                heapq.heappop(queue)
            operands = [a for a in (*node.args, *node.kwargs.values()) if a in aliases or a in versions]
            used, results = use(node), [node]
            if used is not None and operands == [used.operand]:
                if (held if used.operand in aliases else versions[used.operand]) != updated:
                    return f"has changed before {node.name} reads it"
                updated += used.changes
                held = updated if used.in_place else held
                results = used.values
                versions.update(dict.fromkeys(results, updated))
            elif node.target is _COPY_ and node.args[0] in aliases and node.args[1] in versions:
                held = versions[cast(fx.Node, node.args[1])]
                aliases.add(node)
                self.copies.append(node)
            elif node.target is _CAST and node.args[0] in versions and node.kwargs.get("dtype") is tensor.dtype:
                versions[node] = versions[cast(fx.Node, node.args[0])]
                self.copies.append(node)
            else:
                return f"is also used by {node.name}"
            for user in {user for result in results for user in result.users}:
                heapq.heappush(queue, user)
        return "" if held == updated else "is not updated by the graph"

    def rebuild(self) -> list[fx.Node]:
        for step in self.steps:
            assert self.counter is not None
            step.target, step.args = calls.ADD_, (self.counter, 1)
        return _rebuild(self.norms, self.copies)


def _rebuild(apart: list[_Apart], copies: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """Puts each op of training IR in the place of its decomposition; ``copies`` are superfluous then."""
    rebuilt = [_whole(op) for op in apart]
    items = [user for op in apart for users in op.outputs.values() for user in users]
    for node in sorted({*copies, *items, *(op.node for op in apart)}, reverse=True):
        node.graph.erase_node(node)
    return rebuilt


def _whole(op: _Apart) -> fx.Node:
    """The op of training IR, which takes over the uses of the result."""
    buffers = dict(zip(op.row.stats, op.buffers, strict=True))
    given = {**buffers, "training": op.training, "cudnn_enabled": False}  # the last as export writes it
    target, args = op.row.recomposed(op.node.args, dict(op.node.kwargs), given)
    with op.node.graph.inserting_before(op.node):
        whole = op.node.graph.call_function(target, tuple(args))
    whole.meta = {key: value for key, value in op.node.meta.items() if key != "tensor_meta"}
    if isinstance(value := whole.meta.get("val"), tuple | list):
        whole.meta["val"] = value[0]
    for result in op.outputs.get(0, []):
        result.replace_all_uses_with(whole)
    return whole


def _refuse(norm: _Apart, why: str) -> None:
    """Notes the reason, and lets a batch norm in train read copies: the graph overwrites its statistics later."""
    if "refusal" not in note(norm.node):
        add_note(norm.node, refusal=messages.NOT_RECOMPOSED.reason(why=why))
    for name in STATS if norm.training is not False else ():
        operand = norm.operand(name)
        if norm.row.new_state(name) is not None and isinstance(operand, fx.Node) and operand.op == "get_attr":
            with norm.node.graph.inserting_before(norm.node):
                copied = norm.node.graph.call_function(torch.ops.aten.clone.default, (operand,))
            copied.meta = {**operand.meta, "nn_module_stack": norm.node.meta.get("nn_module_stack", {})}
            norm.node.args = tuple(copied if a is operand else a for a in norm.node.args)
            norm.node.kwargs = {k: copied if a is operand else a for k, a in norm.node.kwargs.items()}
