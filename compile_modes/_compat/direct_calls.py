"""The ``forward`` that FX generates for an exported module: tensors go in and come out without a tree being flattened.

``ep.module()`` checks its arguments in hooks, outside of what is compiled, and flattens them by specifications.
Where all arguments are leaves, their names are all there is to it. Checked on torch 2.14.1 and 2.15.0.
"""

import ast
import keyword
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from torch import fx, nn
from torch._dynamo.eval_frame import skip_code
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

_ARGUMENTS = "_compile_modes_arguments"  # what generated code calls the object that knows the names
GUARDS = "_guards_fn"  # the submodule by which ep.module() checks its inputs
_CALL = nn.Module.__call__
_TAKEN = ("self", "torch", _ARGUMENTS)


_F = TypeVar("_F", bound=Callable[..., Any])


def not_a_frame(function: _F) -> _F:
    """Has Dynamo trace through a function where compiled code calls it, and not compile it where eager code does.

    Hooks of a compiled module run ahead of what is compiled; Dynamo would compile each as a frame of its own.
    """
    skip_code(function.__code__)
    return function


class Names(Protocol):
    """The arguments of a program, and what is to be done about others."""

    @property
    def positional(self) -> tuple[str, ...]:
        """The names of those that it was exported with by position."""

    @property
    def keywords(self) -> tuple[str, ...]:
        """The names of those that it was exported with by name."""

    @property
    def order(self) -> tuple[str, ...]:
        """The names that values by position stand for."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What may be left out, the graph's own arguments or others, and what it is then."""

    def ordered(self, module: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The values in the order of the graph's inputs, of arguments that are not all tensors, or not all there."""

    def explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises an error of ours if the arguments are not those of the program."""

    def retraced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The same, of arguments that ``torch.export`` is about to run the graph with."""


class DirectCodeGen(_PyTreeCodeGen):
    """Generates a ``forward`` that binds names itself, and asks only for what isn't the usual call.

    Args:
        info: the names and structures that the program was exported with; the inputs are all leaves.
        arguments: what to ask.
    """

    def __init__(self, info: Any, arguments: Names) -> None:
        super().__init__(info)
        self.arguments = arguments
        self._body_transformer = _shorten

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **how: Any) -> str:
        if how.get("expanded_def"):
            return super().gen_fn_def(free_vars, maybe_return_annotation, **how)
        inputs = [variable.split(":")[0].split("#")[0].split("=")[0].strip() for variable in free_vars]
        known, order = self.arguments.positional + self.arguments.keywords, self.arguments.order
        other = [name for name in dict.fromkeys((*known, *self.arguments.defaults)) if name not in order]
        parameters, unusual = ["self"], [f"not isinstance({name}, torch.Tensor)" for name in known]
        for name in (*order, *other):
            default = self._default(name)
            parameters += ["*"] if other and name == other[0] else []
            parameters.append(f"{name}={default or '...'}" if default or "=" in parameters[-1] else name)
            unusual += _other_than(name, default) if name not in known else []
        lines = [f"def {getattr(self, '_func_name', 'forward')}({', '.join(parameters)}){maybe_return_annotation}:"]
        given = "".join(f"{name}={name}, " for name in (*order, *other))
        asked = f"{_ARGUMENTS}.ordered(self, dict({given}))"
        if unusual:
            lines += [f"if {' or '.join(unusual)}:", f"    {', '.join(known)}, = {asked}" if known else f"    {asked}"]
        lines += [f"{ours} = {name}" for ours, name in zip(inputs, known, strict=True) if ours != name]
        return "\n    ".join(lines) + "\n"

    def _default(self, name: str) -> str:
        """The expression for what an argument is if it isn't given; empty if there is none, or no expression for it."""
        value = self.arguments.defaults.get(name, ...)
        return repr(value) if value is None or type(value) in (bool, int, str) or _is_finite(value) else ""

    def generate_output(self, output_args: Any, **how: Any) -> str:
        spec = self.pytree_info.out_spec
        if how.get("descs") is None and spec is not None and isinstance(output_args, list | tuple):
            text = _literal(spec, iter(map(repr, output_args)))
            if text is not None:
                return f"return {text}"
        return super().generate_output(output_args, **how)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), (_ARGUMENTS, self.arguments)]

    def process_inputs(self, *inputs: Any) -> Any:  # type: ignore[override]
        """What ``fx.Interpreter`` runs the graph on: ``torch.export`` hands over values in the order they came in."""
        call = self._call_of_export()
        return super().process_inputs(*(inputs if call is None else self.arguments.retraced(*call)))

    def _call_of_export(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
        """The call that ``torch.export`` traces by interpreting the graph; None if it is somebody else who does."""
        frame: Any = sys._getframe(2)
        for _ in range(3):
            module, kwargs = frame.f_locals.get("mod"), frame.f_locals.get("kwargs")
            if frame.f_globals.get("__name__") == "torch.export._trace" and isinstance(module, fx.GraphModule):
                values = frame.f_locals["args"]  # those of keywords among them, at the end
                return module, values[: len(values) - len(kwargs)], dict(kwargs)
            frame = frame.f_back
            if frame is None:
                break
        return None


def call_directly(module: Any, arguments: Names) -> bool:
    """Lets calls of a module go straight to its graph, if all arguments are leaves and the graph checks their sizes.

    That takes effect when its code is generated again.

    Args:
        module: a GraphModule that came from ``torch.export``. Its hooks go, which check inputs and let them be modules.
        arguments: its arguments.

    Returns:
        Whether that could be done.
    """
    generator = module.graph._codegen
    names = {*arguments.positional, *arguments.keywords, *arguments.order, *arguments.defaults}
    if type(generator) not in (_PyTreeCodeGen, DirectCodeGen) or not all(map(_is_usable, names)):
        return False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", None) == "torch.export._unlift":
                del hooks[key]
                for kinds in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    kinds.pop(key, None)
    module.graph.set_codegen(DirectCodeGen(generator.pytree_info, arguments))
    return True


def is_direct(module: fx.GraphModule) -> bool:
    """Whether a module's ``forward`` takes its arguments itself."""
    return isinstance(module.graph._codegen, DirectCodeGen)


def is_stale(module: fx.GraphModule) -> bool:
    """Whether the code of a module was generated before :func:`call_directly`."""
    known: Any = type(module).forward.__globals__.get(_ARGUMENTS)
    return isinstance(module.graph._codegen, DirectCodeGen) and known is not module.graph._codegen.arguments


@not_a_frame
def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``__call__`` of a module that is called directly: Python itself binds names, and says little of those it can't.

    Tracers put another one into the place of that of ``nn.Module``, to see who is called.
    """
    try:
        if nn.Module.__call__ is not _CALL:
            return nn.Module.__call__(self, *args, **kwargs)
        if self._compiled_call_impl is not None:
            return self._compiled_call_impl(*args, **kwargs)
        return self._call_impl(*args, **kwargs)
    except TypeError:
        self.graph._codegen.arguments.explain(args, kwargs)
        raise


def enter_directly(module: fx.GraphModule) -> None:
    """Gives the class of a module, after ``recompile()``, a ``__call__`` without torch's wrapper.

    That prints the generated code around an exception.
    """
    if is_direct(module):
        type(module).__call__ = _call  # type: ignore[method-assign]


def _is_usable(name: str) -> bool:
    """Whether generated code can have an argument of this name."""
    return name.isidentifier() and not keyword.iskeyword(name) and name not in _TAKEN and not name.startswith("_")


def _other_than(name: str, default: str) -> list[str]:
    """When an argument that the graph doesn't have is given, and isn't what it was exported with."""
    if default in ("", "None", "True", "False"):
        return [f"{name} is not {default or '...'}"]
    return [f"type({name}) is not type({default})", f"{name} != {default}"]


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _literal(spec: pytree.TreeSpec, leaves: Iterator[str]) -> str | None:
    """The expression for a result; None for what Python has no expression for."""
    if spec.is_leaf():
        return next(leaves)
    if spec.type not in (tuple, list, dict):
        return None
    parts = [_literal(child, leaves) for child in spec.children()]
    if None in parts:
        return None
    if spec.type is dict:
        if not all(type(key) in (str, int) for key in spec.context):
            return None
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(spec.context, parts, strict=True)) + "}"
    inside = ", ".join(str(part) for part in parts)
    return f"[{inside}]" if spec.type is list else f"({inside}{',' if len(parts) == 1 else ''})"


def _shorten(body: list[str]) -> list[str]:
    """Reads modes by the dictionaries in which modules hold each other, and checks sizes without a module's call."""
    lines = [_by_dictionaries(line) if ".training" in line else line for line in body]
    return [line.replace(f"self.{GUARDS}(", f"self._modules[{GUARDS!r}].forward(") for line in lines]


def _by_dictionaries(line: str) -> str:
    target, equals, rest = line.partition(" = ")
    path, semicolon, more = rest.partition(".training")
    if not equals or (more and more[0] not in ";\n #"):
        return line
    try:
        names = _names(ast.parse(path.strip(), mode="eval").body)
    except SyntaxError:
        return line
    if not names:
        return line
    return f"{target} = self" + "".join(f"._modules[{name!r}]" for name in names) + semicolon + more


def _names(expression: ast.expr) -> list[str]:
    """The path that an expression reads from ``self``; empty if it is ``self``, or something else."""
    names: list[str] = []
    while True:
        match expression:
            case ast.Name(id="self"):
                return names[::-1]
            case ast.Attribute(value=inner, attr=name):
                names.append(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[inner, ast.Constant(value=str() as name)]):
                names.append(name)
            case _:
                return []
        expression = inner
