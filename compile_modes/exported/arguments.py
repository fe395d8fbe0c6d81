"""How a module with modes takes its arguments: by position or by name, as the model did before it was exported.

``ep.module()`` takes them exactly as they were passed on export. Eager callers and trainers mix both.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes._compat import calling, direct_calls
from compile_modes.errors import CallError
from compile_modes.graph.owners import module_classes

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Arguments:
    """A forward pre-hook that hands on what the exported graph expects, or says why it can't.

    Attributes:
        positional: names of the arguments that the program was exported with by position.
        keywords: names of those that it was exported with by name.
        plain: whether none of them is a container.
        order: names that values by position stand for. Beyond ``positional`` this takes the signature of the model:
            arguments that were exported by name stand in the order of the call that exported them.
        defaults: values that the model gives arguments by default, and that the program was made for.
        checked: whether the structure of the inputs is checked, too, as ``ep.module()`` does.
        shown: how the signature reads.
    """

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    plain: bool
    order: tuple[str, ...]
    defaults: Mapping[str, Any]
    checked: bool
    shown: str = ""

    @calling.not_a_frame
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the arguments as they were passed on export; None if they are."""
        if len(args) == len(self.positional) and tuple(kwargs) == self.keywords:
            if self.checked:
                calling.check(module, args, kwargs, self.plain)
            return None
        args, kwargs = self._as_exported(args, kwargs)
        if self.checked:
            calling.check(module, args, kwargs, self.plain)
        return args, kwargs

    @calling.not_a_frame
    def ordered(self, module: nn.Module, given: dict[str, Any]) -> tuple[Any, ...]:
        """The values for the graph's inputs, by the names that generated code has for them; ``...`` isn't given."""
        named, traced = {}, _stands_for_values(given)
        for name, value in given.items():
            if value is not ... and (not traced or name in self.positional or name in self.keywords):
                named[name] = value
        args, kwargs = self._as_exported((), named)
        if self.checked and not traced:
            calling.check(module, args, kwargs, self.plain)
        return (*args, *kwargs.values())

    def explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises CallError if the program can't be called so."""
        self._as_exported(args, kwargs)

    def retraced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The values for the graph's inputs, of the arguments that ``torch.export`` was given."""
        self._before_retrace(module, args, kwargs)
        return (*args, *kwargs.values())

    def __eq__(self, other: object) -> bool:
        """Takes the one chance to see how ``torch.export`` calls a GraphModule, and to put its keywords in order."""
        if (call := calling.retraced(self, other)) is not None:
            self._before_retrace(*call)
        return self is other

    __hash__ = object.__hash__

    def _before_retrace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ordered = self._as_exported(args, kwargs)
        if self.checked:
            calling.check(module, *ordered, self.plain)
        names = (self.positional + self.keywords)[len(args) :]
        if self.order[: len(args)] != (self.positional + self.keywords)[: len(args)]:
            raise self._error(messages.RETRACED_BY_POSITION)
        values = dict(zip(self.positional, ordered[0], strict=True)) | ordered[1]
        kwargs.clear()
        kwargs.update({name: values[name] for name in names})

    @calling.not_a_frame
    def _as_exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Runs under Dynamo as well, in a parent that is compiled whole."""
        names = self.positional + self.keywords
        given: dict[str, Any] = {}
        if len(args) > len(self.order):
            raise self._error(messages.TOO_MANY_ARGUMENTS, count=len(args), most=len(self.order))
        for name, value in zip(self.order, args, strict=False):
            given[name] = value
        for name, value in kwargs.items():
            if name in given:
                raise self._error(messages.GIVEN_TWICE, name=name)
            given[name] = value
        for name, value in given.items():
            if name not in names:
                self._check_left_out(name, value)
        for name in names:
            if name not in given:
                if name not in self.defaults:
                    raise self._error(messages.ARGUMENT_MISSING, name=name)
                given[name] = self.defaults[name]
        by_position, by_name = [], {}
        for name in self.positional:
            by_position.append(given[name])
        for name in self.keywords:
            by_name[name] = given[name]
        return tuple(by_position), by_name

    @calling.not_a_frame
    def _check_left_out(self, name: str, value: Any) -> None:
        """An argument that the program does not have may still be given the default that it was exported with."""
        if name not in self.defaults:
            raise self._error(messages.NO_SUCH_ARGUMENT, name=name)
        if not _same(value, self.defaults[name]):
            raise self._error(messages.NOT_ITS_DEFAULT, name=name, default=self.defaults[name])

    def signature(self) -> inspect.Signature:
        """What ``inspect.signature`` shows of the module: the arguments that the program has."""
        names = self.positional + self.keywords
        free = 0  # so many can be given by position
        while free < len(self.order) and self.order[free] in names:
            free += 1
        shown = [*self.order[:free], *(name for name in names if name not in self.order[:free])]
        parameters = []
        for i, name in enumerate(shown):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if i < free else inspect.Parameter.KEYWORD_ONLY
            known = name in self.defaults and (i >= free or all(n in self.defaults for n in shown[i:free]))
            default = self.defaults[name] if known else inspect.Parameter.empty
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(parameters)

    @calling.not_a_frame
    def _error(self, entry: messages.Error[CallError], **fields: Any) -> Exception:
        if torch.compiler.is_dynamo_compiling():  # which can't make exceptions of ours, and shows the text of this
            return TypeError(f"{entry.code}: {entry.cause.format(**fields)} (exported as forward{self.shown})")
        return entry.error(shown=self.shown, **fields)


def take_names(module: nn.Module, forward: inspect.Signature | None = None) -> None:
    """Lets a module that came from ``torch.export`` take its arguments by position and by name, and say their names.

    Args:
        module: a GraphModule or an UnflattenedModule; one that doesn't know what it was exported with is left alone.
        forward: the signature of the model's ``forward``, if it is at hand. Otherwise that of its class is used, where
            this process knows the class. Needed for arguments by position that were exported by name.
    """
    found = calling.inputs(module)
    direct = isinstance(module, fx.GraphModule) and direct_calls.is_direct(module)
    if found is None or direct or calling.before_calls(module, Arguments) is not None:
        return
    forward = forward or _signature_of_class(module)
    order, defaults = found.positional, {}
    if forward is not None and (known := _order(forward, found)) is not None:
        order = known
        for parameter in forward.parameters.values():
            name, default = parameter.name, parameter.default
            exported = name in found.positional + found.keywords
            if default is not parameter.empty and (not exported or _same(found.constants.get(name, found), default)):
                defaults[name] = default
    checked = calling.has_check(module)
    arguments = Arguments(found.positional, found.keywords, found.plain, order, defaults, checked)
    _install(module, arguments)
    if isinstance(module, fx.GraphModule):
        calling.at_copies(module, _Copied(arguments))


@dataclass(frozen=True)
class _Copied:
    """Gives a copy of a GraphModule, which has no hooks, the arguments of the original, without its check."""

    arguments: Arguments

    def __call__(self, copied: nn.Module) -> None:
        _install(copied, replace(self.arguments, checked=False))
        if isinstance(copied, fx.GraphModule) and direct_calls.is_stale(copied):
            copied.recompile()
            direct_calls.enter_directly(copied)


def _install(module: nn.Module, arguments: Arguments) -> None:
    signature = arguments.signature()
    arguments = replace(arguments, shown=str(signature))
    plain = isinstance(module, fx.GraphModule) and arguments.plain
    checked_by_graph = not arguments.checked or calling.checks_sizes(module)
    if not (plain and checked_by_graph and direct_calls.call_directly(module, arguments)):
        calling.take_over_check(module, arguments)
    _compat.sign(module, signature)


def _signature_of_class(module: nn.Module) -> inspect.Signature | None:
    """That of the ``forward`` of the class that was exported, without ``self``."""
    graph: Any = module.graph
    kinds = next((kinds for node in graph.nodes if (kinds := module_classes(node))), [None])
    if kinds[0] is None or issubclass(kinds[0], fx.GraphModule):
        return None
    signature = inspect.signature(kinds[0].forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _order(forward: inspect.Signature, found: calling.Inputs) -> tuple[str, ...] | None:
    """The names that values by position stand for; None if this is not the signature that the program was made with."""
    by_position = [p.name for p in forward.parameters.values() if p.kind in _BY_POSITION]
    kinds = {p.kind: p.name for p in forward.parameters.values()}
    rest = found.positional[len(by_position) :]
    starred = kinds.get(inspect.Parameter.VAR_POSITIONAL)
    if list(found.positional[: len(by_position)]) != by_position[: len(found.positional)]:
        return None
    if rest != tuple(f"{starred}_{i}" for i in range(len(rest))):
        return None
    if inspect.Parameter.VAR_KEYWORD not in kinds and not forward.parameters.keys() >= set(found.keywords):
        return None
    return tuple(by_position) + rest


@calling.not_a_frame
def _stands_for_values(given: dict[str, Any]) -> bool:
    """Whether ``fx.symbolic_trace`` passes what stands for values that it doesn't have."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return any(isinstance(value, fx.Proxy) for value in given.values())


@calling.not_a_frame
def _same(value: Any, default: Any) -> bool:
    if isinstance(default, tuple) and isinstance(value, tuple) and len(value) == len(default):
        for one, other in zip(value, default, strict=True):  # noqa: SIM110  Dynamo traces it
            if not _same(one, other):
                return False
        return True
    return value is default or (
        type(value) is type(default) and isinstance(default, int | float | str) and value == default
    )
