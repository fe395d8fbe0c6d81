"""From a tree of ops and switches back to a graph, with the regions that its ops run in."""

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat
from compile_modes.exported.pairing import storage
from compile_modes.exported.switching.traces import Context, Graph, Held, Input, Op, map_values, values_of
from compile_modes.exported.switching.trees import Items, Switch, Tree, top
from compile_modes.graph import calls
from compile_modes.graph.edits import OWNED
from compile_modes.graph.owners import canonical

Item = Op | Switch


@dataclass
class Emitted:
    """The nodes that ops and switches have become; what nobody needs has become none."""

    ops: dict[Op, fx.Node] = field(default_factory=dict)
    switches: dict[Switch, fx.Node] = field(default_factory=dict)


def emit(root: fx.GraphModule, tree: Tree) -> Emitted:
    """Makes the graph of ``root`` that of the tree, in place. Inputs, their checks and their structure stay."""
    prune(tree)
    emitter = _Emitter(root, tree)
    old, graph = root.graph, fx.Graph()
    env: dict[Any, fx.Node] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(old.find_nodes(op="placeholder")):
        copies[node] = env[Input(index)] = graph.node_copy(node)
    for node in old.nodes:
        if node.op == "call_module" and node.target == _compat.GUARDS:
            graph.node_copy(node, copies.__getitem__)
    scope = _Scope(graph, {}, env, ())
    emitter.items(tree.items, scope)
    graph.output(emitter.arguments(tree.outputs, scope))
    graph.output_node().meta = dict(old.output_node().meta)
    for name, module in scope.children.items():
        setattr(root, name, module)
    for name, module in list(root.named_children()):  # bodies of the regions before
        if isinstance(module, fx.GraphModule) and name not in scope.children:
            delattr(root, name)
    graph._codegen = old._codegen
    root.graph = graph
    return emitter.done


def prune(tree: Tree) -> None:
    """Drops values that leave a switch and that nobody reads, and switches that do nothing else."""
    while True:
        used = set(map(id, values_of(tree.outputs))) | {id(v) for v in _uses(tree.items)}
        switches = list(_switches(tree.items))
        if all(id(phi) in used for switch in switches for phi in switch.phis):
            return
        for switch in switches:
            switch.phis = [phi for phi in switch.phis if id(phi) in used]


def _switches(items: Items) -> Iterable[Switch]:
    for item in items:
        if isinstance(item, Switch):
            yield item
            yield from _switches(item.train)
            yield from _switches(item.evaluation)


def _uses(items: Iterable[Item]) -> Iterable[Any]:
    """All values that items read, those that they make themselves among them."""
    for item in items:
        if isinstance(item, Op):
            yield from values_of((item.args, item.kwargs))
            if item.counter is not None:
                yield item.counter
        else:
            yield from _uses(item.train)
            yield from _uses(item.evaluation)
            for phi in item.phis:
                yield phi.train
                yield phi.evaluation


def _made(items: Iterable[Item]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, Op):
            yield item
        else:
            yield from item.phis
            yield from _made(item.train)
            yield from _made(item.evaluation)


@dataclass
class _Scope:
    """A graph that is being written: what it holds, what stands for each value in it, and the regions around it."""

    graph: fx.Graph
    children: dict[str, nn.Module]
    env: dict[Any, fx.Node]
    context: tuple[Context, ...]


class _Emitter:
    def __init__(self, root: fx.GraphModule, tree: Tree) -> None:
        self.root, self.done = root, Emitted()
        self.counts = Counter(_uses(tree.items)) + Counter(values_of(tree.outputs))
        self.numbers = itertools.count()
        state = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
        self.paths: dict[Any, str] = {}
        for name, tensor in state:
            self.paths.setdefault(storage(tensor), name)

    def items(self, items: Sequence[Item], scope: _Scope) -> None:
        depth = len(scope.context)
        index = 0
        while index < len(items):
            item = items[index]
            context = _context(item)
            if len(context) <= depth or isinstance(item, Switch):
                self.op(item, scope) if isinstance(item, Op) else self.switch(item, scope)
                index += 1
                continue
            end = index + 1
            while end < len(items) and _context(items[end])[: depth + 1] == context[: depth + 1]:
                end += 1
            self.region(items[index:end], context[: depth + 1], scope)
            index = end

    def op(self, op: Op, scope: _Scope) -> None:
        graph = scope.graph
        if op.counter is not None:
            step = graph.create_node("call_function", calls.ADD_, (self.node(op.counter, scope), 1), name="add_")
            step.meta = {k: v for k, v in op.node.meta.items() if k == "nn_module_stack"}
            step.meta["val"] = op.counter.value
        args = self.arguments(op.args, scope)
        kwargs = self.arguments(op.kwargs, scope)
        node = graph.create_node(op.node.op, op.node.target, args, kwargs, name=op.node.name)
        node.meta = {key: value for key, value in op.node.meta.items() if key != "from_node"}
        scope.env[op] = self.done.ops[op] = node

    def arguments(self, arguments: Any, scope: _Scope) -> Any:
        if isinstance(arguments, Graph):
            return self.child(arguments.module, scope)
        if isinstance(arguments, tuple | list):
            mapped = [self.arguments(item, scope) for item in arguments]
            return mapped if isinstance(arguments, list) else tuple(mapped)
        if isinstance(arguments, dict):
            return {name: self.arguments(item, scope) for name, item in arguments.items()}
        return map_values(arguments, lambda value: self.node(value, scope))

    def child(self, module: nn.Module, scope: _Scope, stem: str = "body") -> fx.Node:
        name = f"_{stem}_{next(self.numbers)}"
        while hasattr(self.root, name):
            name = f"_{stem}_{next(self.numbers)}"
        scope.children[name] = module
        return scope.graph.create_node("get_attr", name)

    def node(self, value: Any, scope: _Scope) -> fx.Node:
        if value not in scope.env and isinstance(value, Held):
            path = self.paths.get(value.key[1]) if value.key[0] == "state" else None
            scope.env[value] = scope.graph.create_node("get_attr", path or self.constant(value))
        return scope.env[value]

    def constant(self, held: Held) -> str:
        """A name for something that the module holds and that is no state, in no ``state_dict`` of a copy either."""
        name = next(name for i in itertools.count() if not hasattr(self.root, name := f"_constant_of_branch_{i}"))
        if isinstance(held.value, torch.Tensor):
            self.root.register_buffer(name, held.value, persistent=False)
        else:
            setattr(self.root, name, held.value)
        return name

    def region(self, items: Sequence[Item], context: tuple[Context, ...], scope: _Scope) -> None:
        inputs, within = self.inputs(items)
        results = [v for v in dict.fromkeys(_made(items)) if self.counts[v] > within[v]]
        body = self.body(items, inputs, results, context, scope)
        target, settings = context[-1]
        call = scope.graph.call_function(
            target, (*settings, self.child(body, scope), *(self.node(value, scope) for value in inputs))
        )
        first = next(op for op in _made(items) if isinstance(op, Op)).node.meta
        call.meta = {key: first[key] for key in ("nn_module_stack", "stack_trace") if key in first}
        call.meta["val"] = tuple(_val(value) for value in results)
        self.take(call, results, scope)

    def switch(self, switch: Switch, scope: _Scope) -> None:
        items = [*switch.train, *switch.evaluation]
        if not items and not switch.phis:
            return
        inputs, _ = self.inputs([switch])
        raw = []
        for branch, side in ((switch.train, "train"), (switch.evaluation, "evaluation")):
            within = Counter(_uses(branch)) + Counter(getattr(phi, side) for phi in switch.phis)
            raw.append([v for v in dict.fromkeys(_made(branch)) if self.counts[v] > within[v]])
        modules = []
        for index, branch in enumerate((switch.train, switch.evaluation)):
            phis = [phi.evaluation if index else phi.train for phi in switch.phis]
            results = [*phis, *(None if index else v for v in raw[0]), *(v if index else None for v in raw[1])]
            modules.append(self.body(branch, inputs, results, scope.context, scope))
        branches = [self.child(m, scope, f"switch_{name}") for m, name in zip(modules, ("train", "eval"), strict=True)]
        operands = [self.node(value, scope) for value in inputs]
        call = scope.graph.call_function(calls.switch, (True, *branches, *operands))
        call.meta = {"nn_module_stack": _stack_of(switch.decider, items)}
        self.done.switches[switch] = call
        self.take(call, [*switch.phis, *raw[0], *raw[1]], scope)

    def inputs(self, items: Sequence[Item]) -> tuple[list[Any], "Counter[Any]"]:
        """The values that items take from outside, and how often they use each value."""
        within = Counter(_uses(items))
        made = set(_made(items))
        return [value for value in within if value not in made], within

    def body(
        self, items: Sequence[Item], inputs: list[Any], results: list[Any], context: tuple[Context, ...], scope: _Scope
    ) -> fx.GraphModule:
        inner = _Scope(fx.Graph(), {}, {}, context)
        for i, value in enumerate(inputs):
            inner.env[value] = inner.graph.placeholder(scope.env[value].name if value in scope.env else f"held_{i}")
            inner.env[value].meta = {"val": _val(value)}
        self.items(items, inner)
        inner.graph.output(tuple(None if v is None else self.node(v, inner) for v in results))
        module = fx.GraphModule(inner.children, inner.graph)
        module.meta[OWNED] = True
        return module

    def take(self, call: fx.Node, results: Sequence[Any], scope: _Scope) -> None:
        for index, value in enumerate(results):
            item = scope.graph.call_function(operator.getitem, (call, index))
            item.meta = {"val": _val(value)}
            if isinstance(op := top(value), Op) and "nn_module_stack" in op.node.meta:
                item.meta["nn_module_stack"] = op.node.meta["nn_module_stack"]
            scope.env[value] = item


def _context(item: Item) -> tuple[Context, ...]:
    """The regions that an item is in, as far as all of it is."""
    if isinstance(item, Op):
        return item.context
    contexts = [_context(inner) for inner in (*item.train, *item.evaluation)]
    if not contexts:
        return ()
    shared = 0
    while all(len(c) > shared and c[shared] == contexts[0][shared] for c in contexts):
        shared += 1
    return contexts[0][:shared]


def _val(value: Any) -> Any:
    value = top(value)
    return _compat.value(value.node) if isinstance(value, Op) else getattr(value, "value", None)


def _stack_of(decider: str, items: Sequence[Item]) -> dict[str, Any]:
    """What names the module that decides as the owner of a node, as far as it is known from what it decides about."""
    for op in _made(items):
        stack = op.node.meta.get("nn_module_stack") or {} if isinstance(op, Op) else {}
        names = [canonical(path) for path, _ in stack.values()]
        if decider in names:
            return dict(itertools.islice(stack.items(), names.index(decider) + 1))
    return {f"decider {decider}": (decider, "torch.nn.modules.module.Module")}
