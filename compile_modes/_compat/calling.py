"""How a module that came from ``torch.export`` is called: the names of its inputs, and its check of them."""

import sys
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export._unlift import _check_input_constraints_pre_hook
from torch.export.unflatten import UnflattenedModule
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from compile_modes._compat import GUARDS
from compile_modes._compat.direct_calls import not_a_frame as not_a_frame


class Inputs(NamedTuple):
    """The arguments that a program was exported with.

    Attributes:
        positional: names of those that were passed by position.
        keywords: names of those that were passed by name.
        constants: for arguments that are no tensors and no containers, the value that the program was made for.
        plain: whether no argument is a container.
    """

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    constants: dict[str, Any]
    plain: bool


def inputs(module: nn.Module) -> Inputs | None:
    """The arguments of an exported module; None if the module does not know them."""
    found = _names(module)
    if found is None:
        return None
    names, spec = found
    args, kwargs = spec.child(0), spec.child(1)
    if spec.type is not tuple or args.type is not tuple or kwargs.type is not dict:
        return None
    count, keywords = args.num_children, tuple(kwargs.context)
    if len(set(names)) != len(names) or tuple(names[count:]) != keywords:
        return None
    children = [*args.children(), *kwargs.children()]
    graph: Any = module.graph
    placeholders, constants = iter(graph.find_nodes(op="placeholder")), {}
    for name, child in zip(names, children, strict=True):
        nodes = [next(placeholders, None) for _ in range(child.num_leaves)]
        value = nodes[0].meta.get("val", nodes) if child.is_leaf() and nodes[0] is not None else nodes
        if value is None or type(value) in (bool, int, float, str):
            constants[name] = value
    return Inputs(tuple(names[:count]), keywords, constants, all(child.is_leaf() for child in children))


def _names(module: nn.Module) -> tuple[list[str], pytree.TreeSpec] | None:
    if isinstance(module, fx.GraphModule) and isinstance(module.graph._codegen, _PyTreeCodeGen):
        info = module.graph._codegen.pytree_info
        names, spec = info.orig_args, info.in_spec
    elif isinstance(module, UnflattenedModule) and module.flat_args_adapter is None:
        signature = module.module_call_graph[0].signature
        if signature is None or signature.forward_arg_names is None:
            return None
        names, spec = signature.forward_arg_names, signature.in_spec
    else:
        return None
    pair = spec.num_children == 2 and len(names) == sum(child.num_children for child in spec.children())
    return (names, spec) if pair else None


def has_check(module: nn.Module) -> bool:
    """Whether a call checks the structure of its inputs in a hook, as that of ``ep.module()`` does and a copy not."""
    return _check_input_constraints_pre_hook in module._forward_pre_hooks.values()


def checks_sizes(module: nn.Module) -> bool:
    """Whether a function in the graph looks at the sizes of the inputs."""
    return GUARDS in module._modules


def take_over_check(module: nn.Module, hook: Any) -> None:
    """Puts a forward pre-hook with keywords into the place of that check, or before all others if there is none."""
    for key, present in module._forward_pre_hooks.items():
        if present is _check_input_constraints_pre_hook:
            module._forward_pre_hooks[key] = hook
            return
    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


@not_a_frame
def check(module: nn.Module, args: Any, kwargs: Any, plain: bool) -> None:
    """What the check did: the structure of the inputs, and sizes where no function of the graph looks at them.

    Args:
        plain: whether tensors alone are known to be right.
    """
    if plain and checks_sizes(module):
        for value in (*args, *kwargs.values()):
            if not isinstance(value, torch.Tensor):
                break
        else:
            return
    _check_input_constraints_pre_hook(module, args, kwargs)


def retraced(hook: Any, asked: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The call that ``torch.export`` is about to run, when it asks a module's hooks whether one is its own check.

    It runs a GraphModule by ``fx.Interpreter``, without hooks, and with the values of keywords in the order in which
    they were given: by other names than the graph's (seen on 2.14.1 and 2.15.0). The keywords that this returns are
    the very ones.
    None if it isn't that which compares ``hook`` with ``asked``.
    """
    if asked is not _check_input_constraints_pre_hook:
        return None
    scope = sys._getframe(2).f_locals
    module, args, kwargs = scope.get("mod"), scope.get("args"), scope.get("kwargs")
    if isinstance(module, fx.GraphModule) and isinstance(args, tuple) and isinstance(kwargs, dict):
        return (module, args, kwargs) if hook in module._forward_pre_hooks.values() else None
    return None


def before_calls(module: nn.Module, kind: type) -> Any:
    """The forward pre-hook of a class that a module has; None if it has none."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)), None)


def at_copies(module: fx.GraphModule, hook: Any) -> None:
    """Has ``hook(copied)`` run for each deep copy of a GraphModule, and for copies of those."""
    if hook not in module._deepcopy_hooks:
        module._deepcopy_hooks.append(hook)
