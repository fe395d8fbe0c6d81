"""Owners of a captured graph's sites, under the names that the user of the compiled module knows.

Dynamo names modules from the frame that it compiles, and lets nodes of an exported module keep the names of their own
program. ``named_modules()`` of what was given to ``torch.compile`` is what both are translated to here.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import _compat
from compile_modes._compat import frames
from compile_modes.graph.dual import DualModule
from compile_modes.graph.finding import find
from compile_modes.graph.flags import CELL
from compile_modes.graph.owners import dynamo_path, join
from compile_modes.graph.sites import Site
from compile_modes.graph.view import Body, View

_VARIABLE = re.compile(r"[LG]\['[^']*'\]")


@dataclass
class Names:
    """The modules of a compilation in progress.

    Attributes:
        variables: where the name of each variable that holds a module begins: ``{"L['self']": "layers.0"}``.
        modules: every module below those variables, by its full name: the first, if it has several.
        aliases: all names that lead to one of them, and its full name.
        by_id: the full name of each module, by the id by which Dynamo writes it into ``nn_module_stack``.
        everything: all modules that there are, by their full names; empty if the compiled module isn't known.
        read: the full names of modules whose ``training`` Python has read.
        unclear: exported modules that could not be told apart.
    """

    variables: dict[str, str] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    by_id: dict[int, str] = field(default_factory=dict)
    everything: dict[str, nn.Module] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    unclear: set[str] = field(default_factory=set)

    @classmethod
    def of_frame(cls) -> "Names":
        """The names of the frame that Dynamo is compiling; empty outside of Dynamo."""
        names, root = cls(), frames.compiled_root()
        if root is not None:
            names.everything = dict(root.named_modules())
            names.by_id = {id(module): name for name, module in names.everything.items()}
        for variable, module in frames.roots_read().items():
            start = names.variables[variable] = names.by_id.get(id(module), "")
            for path, submodule in module.named_modules(remove_duplicate=False):
                name = names.by_id.setdefault(id(submodule), _below(start, path))
                names.modules[name] = submodule
                names.aliases[_below(start, path)] = name
        for source in frames.guarded():
            # Not what a cell reads on behalf of a graph, which the graph's sites say.
            if source.endswith(".training") and CELL not in source:
                owner = names.full(source.removesuffix(".training"))
                if owner is not None:
                    names.read.add(owner)
        return names

    def full(self, source: str) -> str | None:
        """The full name of a module or buffer that Dynamo calls ``source``; None if it is in none of the variables."""
        variable = _VARIABLE.match(source)
        start = self.variables.get(variable.group()) if variable else None
        if start is None:
            return None
        path = _below(start, dynamo_path(source))
        home, _, leaf = path.rpartition(".")
        return self.aliases[path] if path in self.aliases else _below(self.aliases.get(home, home), leaf)

    def pin(self) -> None:
        """Keeps the compiled code to the modules that it is compiled for, where their names are more than a type's.

        Dynamo compiles the ``forward`` of a submodule once for all submodules of the type, if it compiles it at all.
        """
        for variable, start in self.variables.items():
            if start:
                frames.pin_variable(variable)

    def exported(self) -> dict[str, list[nn.Module]]:
        """The exported modules, each with the programs that it may run, by full name; the outermost ones only."""
        found: dict[str, list[nn.Module]] = {}
        for name, module in self.modules.items():
            if any(name.startswith(outer + ".") or not outer for outer in found):
                continue
            if isinstance(module, DualModule):
                found[name] = [module.program(True), module.program(False)]
            elif isinstance(module, fx.GraphModule | UnflattenedModule):
                found[name] = [module]
        return found


def name_owners(view: View, names: Names) -> list[Site]:
    """The sites of a captured graph, their owners under their full names.

    A site of an exported module, whose nodes say nothing of where the module stands, is found by the call that it
    belongs to: calls run the nodes of a program in its order, and read the state of one module. What stays unclear,
    for want of any state, keeps its name within the program.
    """
    found = find(view)
    by_node = {site.node: site for site in found}
    for call in _calls(view.main, names):
        inside = [by_node[node] for node in _nodes(call) if node in by_node]
        if call.programs:
            _name_exported(inside, call, names)
        else:
            for site in inside:
                _name_traced(site, names)
    return found


def _name_traced(site: Site, names: Names) -> None:
    stack = site.node.meta.get("nn_module_stack") or {}
    key = next(reversed(stack), "").partition("@")[0]
    if key.isdigit() and int(key) in names.by_id:
        site.owner = names.by_id[int(key)]
        return
    sources = [path for path, _ in stack.values()] or list(names.variables)
    variable = _VARIABLE.match(sources[-1]) if stack or len(sources) == 1 else None
    owner = _below(names.variables.get(variable.group(), ""), site.owner) if variable else site.owner
    site.owner = names.aliases.get(owner, owner)


@dataclass(frozen=True)
class _Program:
    """One program of an exported module: the module's full name, its sites as they run, and the order of its nodes."""

    name: str
    sites: tuple[Site, ...]
    order: dict[str, int]

    def holds(self, path: str) -> bool:
        """Whether a parameter or buffer is below the module."""
        return not self.name or path.startswith(self.name + ".")


@dataclass
class _Call:
    """A run of nodes in a captured graph that one call of an exported module has left behind, or what lies between.

    Attributes:
        body: the graph.
        programs: those that the nodes may come from, each with the position that it is at; empty between calls.
        nodes: the run.
    """

    body: Body
    programs: dict[str, tuple[_Program, int]] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def takes(self, node: fx.Node, state: set[str]) -> bool:
        """Whether ``node`` may belong to the same call; if so, it does afterwards."""
        origin = _origin(node)
        left = {}
        for key, (program, last) in self.programs.items():
            position = last if origin is None else program.order.get(origin, -1)
            if position >= last and all(map(program.holds, state)):
                left[key] = program, position
        if left:
            self.programs = left
            self.nodes.append(node)
        return bool(left)


def _calls(body: Body, names: Names) -> Iterator[_Call]:
    """Splits a graph into the calls of exported modules, and what lies between them."""
    every = {f"{name}:{i}": (_program(name, program), 0) for name, programs in names.exported().items()
             for i, program in enumerate(programs)}  # fmt: skip
    call = _Call(body)
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        state = set(_state(node, names)) if every else set()
        if not every or not (_origin(node) or _names_of_program(node)):
            if call.programs:
                yield call
                call = _Call(body)
            call.nodes.append(node)
        elif not (call.programs and call.takes(node, state)):
            yield call
            call = _Call(body, every)
            if not call.takes(node, state):
                call = _Call(body, {}, [node])
    yield call


def _program(name: str, program: nn.Module) -> _Program:
    view = View(program)
    by_node, nodes = {site.node: site for site in find(view)}, list(view.main.graph.nodes)
    inside = [by_node[node] for node in _nodes(_Call(view.main, {}, nodes)) if node in by_node]
    return _Program(name, tuple(inside), {_origin(node) or node.name: i for i, node in enumerate(nodes)})


def _nodes(call: _Call) -> Iterator[fx.Node]:
    """The nodes of a call as they run, those of bodies in the place of their callers."""

    def visit(body: Body, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        for node in nodes:
            child = body.children.get(node)
            if child is None:
                yield node
            else:
                yield from visit(child, child.graph.nodes)

    return visit(call.body, call.nodes)


def _name_exported(inside: Sequence[Site], call: _Call, names: Names) -> None:
    programs = [program for program, _ in call.programs.values()]
    overloads = [site.op.overload for site in inside]
    exact = [p for p in programs if [site.op.overload for site in p.sites] == overloads]
    if len({program.name for program in exact}) == 1:
        for site, original in zip(inside, exact[0].sites, strict=True):
            site.owner = _below(exact[0].name, original.owner)
    elif len({program.name for program in programs}) == 1:  # a part of a call, for the graph was broken
        for site in inside:
            if not programs[0].holds(site.owner):
                site.owner = _below(programs[0].name, site.owner)
    elif inside:
        names.unclear |= {program.name for program in programs}


def _below(start: str, path: str) -> str:
    return join(start, path) if path else start


def _origin(node: fx.Node) -> str | None:
    """The name that a node had in the exported program that it comes from; None if it comes from none."""
    sources: Any = node.meta.get("from_node") or ()
    name = None
    while sources:
        source = sources[-1]
        if source.pass_name == _compat.EXPORTED:
            name = source.name
        sources = source.from_node
    return name


def _names_of_program(node: fx.Node) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return bool(stack) and not any(_VARIABLE.match(path) for path, _ in stack.values())


def _state(node: fx.Node, names: Names) -> Iterator[str]:
    for operand in node.all_input_nodes:
        source = frames.source_name(operand) if operand.op == "placeholder" else ""
        home = names.by_id.get(id(frames.holder(operand))) if source else None
        if home is not None:
            yield _below(home, dynamo_path(source).rpartition(".")[2])
        elif path := names.full(source):
            yield path
