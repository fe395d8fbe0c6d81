"""Inductor's freezing, with what it folds written down, and its compiled code with other constants.

Checked on torch 2.14.1 and 2.15.0. ``compile_fx`` freezes a graph whose weights are attributes, outside of Dynamo: it
puts them into the graph as constants, folds what follows from constants alone in several rounds, and packs weights for
its kernels. Each constant that this leaves passes through ``replace_node_with_constant``, at a time when the node that
it replaces is still there; from those nodes, and so from the weights, the constants can be computed again. The compiled
module reads its constants as globals, so a copy of its functions with other globals computes with other constants.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, constant_folding, freezing
from torch._inductor.fx_passes import freezing_patterns
from torch._inductor.pattern_matcher import PatternMatcherPass

# Called before a node is replaced by a constant, with the graph, the node and the constant; what it returns is called
# with the name that the constant has got.
Record = Callable[[fx.GraphModule, fx.Node, torch.Tensor], Callable[[str], None]]

_ONE_AT_A_TIME = threading.RLock()
_SETTINGS = {
    "freezing": True,
    "freezing_discard_parameters": False,
    "always_keep_tensor_constants": True,  # small ones would become numbers in the code
    "graph_partition": False,  # the compiled module is a function, not an object that dies with its code
}


class Unfrozen(Exception):
    """What Inductor made of a graph is not what this module knows how to refresh."""


@dataclass
class Frozen:
    """A frozen graph, compiled.

    Attributes:
        run: takes the inputs that are no weights, and calls ``view()`` for what to run.
        constants: by the global that compiled code reads, what it was folded to: a name that the recorder was told,
            or, of constants that follow from no weight, None.
        call: the compiled function, whose globals these are.
    """

    run: Callable[..., Any]
    constants: dict[str, str | None]
    call: types.FunctionType

    def forget(self, names: Iterable[str]) -> None:
        """Lets go of constants that it was compiled with."""
        self.call.__globals__.update(dict.fromkeys(names))


def settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that ``torch.compile(mode=mode, options=options)`` patches in."""
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options), None).config)


def is_static(placeholder: fx.Node) -> bool:
    """Whether a graph input is a parameter or buffer of a module, by Dynamo's mark."""
    noted = placeholder.meta.get("tensor_dict") or {}
    return noted.get("_dynamo_static_input_type") is not None


def freeze(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    record: Record,
    view: Callable[[], Callable[..., Any]],
    patches: Mapping[str, Any],
) -> Frozen:
    """Has Inductor freeze and compile a graph whose weights are its attributes.

    Args:
        gm: the graph; taken apart.
        inputs: real tensors, as it will be called with.
        record: told of each constant.
        view: called at each run for the function to run, a result of :func:`with_constants`.
        patches: Inductor's configuration.

    Raises:
        Unfrozen: the result can't be refreshed.
    """
    compiled: list[tuple[Any, dict[str, torch.Tensor]]] = []
    modules = [gm]

    def inner(frozen: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        if len(example_inputs) != sum(isinstance(value, torch.Tensor) for value in inputs):
            raise Unfrozen("a view of a weight is returned")
        if any(node.op == "get_attr" for node in frozen.graph.output_node().all_input_nodes):
            raise Unfrozen("a result follows from weights alone")  # it would be the constant itself
        held = dict(frozen.named_buffers(remove_duplicate=False))
        code: Any = compile_fx.compile_fx_inner(frozen, example_inputs, **kwargs)
        compiled.append((code, held))
        modules.append(frozen)

        def run(args: list[Any]) -> Any:
            return view()(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with _ONE_AT_A_TIME, _recording(record), torch.no_grad(), functorch_config.patch(enable_autograd_cache=False):
        run: Any = compile_fx.compile_fx(gm, list(inputs), inner_compile=inner, config_patches={**patches, **_SETTINGS})
    if len(compiled) != 1:
        raise Unfrozen(f"{len(compiled)} graphs are compiled of one")
    code, held = compiled[0]
    if getattr(code, "mutated_inputs", None):
        raise Unfrozen("an input is written to")
    call = getattr(code, "current_callable", None)
    if not isinstance(call, types.FunctionType):
        raise Unfrozen(f"the compiled code is a {type(call).__name__}")
    constants = _constants(code, held, call.__globals__)
    for module in modules:  # someone keeps them, and with them the weights that were there first
        module._buffers.clear()
    return Frozen(run, constants, call)


def with_constants(call: types.FunctionType, constants: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """A compiled function, with everything else that its module defines, over other constants.

    Kernels are read from the globals too, and are shared.
    """
    old = call.__globals__
    new: dict[str, Any] = {**old, **constants}

    def moved(function: Any) -> Any:
        if not isinstance(function, types.FunctionType) or function.__globals__ is not old:
            return function
        other = types.FunctionType(
            function.__code__, new, function.__name__, function.__defaults__, function.__closure__
        )
        other.__dict__.update(function.__dict__)
        return other

    new.update({name: moved(value) for name, value in old.items() if isinstance(value, types.FunctionType)})
    return moved(call)  # type: ignore[no-any-return]


def _constants(code: Any, held: Mapping[str, torch.Tensor], read: Mapping[str, Any]) -> dict[str, str | None]:
    """Which constant of the graph each global of the compiled code is."""
    found: dict[str, str | None] = dict(code.frozen_param_names)
    for name, value in (code.constants or {}).items():
        names = [other for other, tensor in held.items() if tensor is value]
        if not names:
            raise Unfrozen(f"{name} is no constant of the graph: Inductor has made it of others")
        found[name] = names[0]
    for name in found:
        if name not in read:
            raise Unfrozen(f"the compiled code has no {name}")
    return found


@contextlib.contextmanager
def _recording(record: Record) -> Iterator[None]:
    """Reports each constant that is folded, and keeps Inductor from folding arithmetic into convolutions.

    ``binary_folding`` gives all constants that it makes of scalars one name, so that two of them are one.
    """
    stock = constant_folding.replace_node_with_constant
    thread = threading.get_ident()

    def replace(gm: fx.GraphModule, node: fx.Node, constant: Any = None, name: str | None = None) -> None:
        if threading.get_ident() != thread or constant is None:
            stock(gm, node, constant, name)
            return
        before = set(gm._buffers)
        named = record(gm, node, constant)
        stock(gm, node, constant, name)
        (new,) = set(gm._buffers) - before
        named(new)

    with (
        mock.patch.object(constant_folding, "replace_node_with_constant", replace),
        mock.patch.object(freezing, "replace_node_with_constant", replace),
        mock.patch.object(freezing_patterns, "binary_folding_pass", PatternMatcherPass()),
    ):
        yield
