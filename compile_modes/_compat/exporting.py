"""What torch.export forgets of a model while it traces it, noted or kept.

Checked on torch 2.14.1 and 2.15.0. Non-strict export runs the model under the tracer of
``fx.experimental.proxy_tensor`` and then makes regions of what the tracer recorded, in two passes: one for grad mode,
one for autocast.

- A dropout in eval returns the very tensor that it is given. The tracer, which knows values by identity, takes later
  uses of the input for uses of the result.
- The first pass splits the graph where grad mode is switched. What is split within an autocast region gets an enter and
  an exit of it, in front of the switch, and the pass, which looks for a switch in the first place only, drops it.
- The first pass also drops switches to the mode that export itself is called in.
- ``inference_mode`` is set in C++ and not recorded at all.
- Of an ``autograd.Function``, the ops of its ``forward`` are recorded, and not that they have another backward.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch._export.passes import replace_set_grad_with_hop_pass as grad_pass
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

MARK = "compile_modes_export"  # in the ``custom`` meta, which export carries along: a Mark as a dict
# Grad mode when a node ran, whether it is the alias of a dropout's input, and the autograd.Function that it is of.
GRAD, ALIAS, FUNCTION = "grad", "alias", "function"

_exporting = threading.RLock()  # what is replaced in torch below is for one export at a time

_Call = Callable[..., Any]


@contextlib.contextmanager
def exact(returns_input: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool]) -> Iterator[None]:
    """In it, exports of this thread keep what they would forget; to be called for one export at a time.

    Each node of ATen is marked with its grad mode. Calls that return their input get an alias of it, in a marked node.

    Args:
        returns_input: whether a call of an op, with these arguments, returns the first.
    """
    inference, helper = torch.inference_mode, "_is_set_grad_enabled_sub_mod"
    replaced: list[tuple[Any, str, Any]] = [
        (proxy_tensor, "proxy_call", _marking(proxy_tensor.proxy_call, returns_input)),
        (grad_pass, helper, _looking_past_autocast(getattr(grad_pass, helper))),
        (inference, "__enter__", _enter_as_grad_mode(inference.__enter__)),
        (inference, "__exit__", _exit_as_grad_mode(inference.__exit__)),
    ]
    with _exporting, torch.inference_mode(False), torch.enable_grad():
        originals = [(holder, name, getattr(holder, name)) for holder, name, _ in replaced]
        try:
            for holder, name, value in replaced:
                setattr(holder, name, value)
            yield
        finally:
            for holder, name, value in originals:
                setattr(holder, name, value)


def mark(node: fx.Node) -> dict[str, Any]:
    """What was marked on a node while it was exported."""
    return (node.meta.get("custom") or {}).get(MARK, {})  # type: ignore[no-any-return]


def unmark(node: fx.Node) -> None:
    """Takes the mark off, and what held it if that is empty then."""
    if mark(node):
        custom = {key: value for key, value in node.meta["custom"].items() if key != MARK}
        node.meta.update(custom=custom)
        if not custom:
            del node.meta["custom"]


def _marking(original: _Call, returns_input: Callable[..., bool]) -> _Call:
    thread = threading.get_ident()

    def proxy_call(mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:
        if not pre_dispatch or threading.get_ident() != thread:
            return original(mode, func, pre_dispatch, args, kwargs)
        last = next(reversed(mode.tracer.graph.nodes), None)
        aliased = returns_input(func, args, kwargs)
        if aliased:
            # Without gradients, no view: autograd would refuse to write to one later, with gradients.
            below = contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
            with below:
                alias = original(mode, torch.ops.aten.alias.default, pre_dispatch, args[:1], {})
            args = (alias, *args[1:])
        result = original(mode, func, pre_dispatch, args, kwargs)
        for node in reversed(mode.tracer.graph.nodes):
            if node is last:
                break
            own = node.target is torch.ops.aten.alias.default and aliased
            marked = {GRAD: torch.is_grad_enabled(), ALIAS: own, FUNCTION: _function()}
            node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: marked}
        return result

    return proxy_call


def _function() -> str:
    """The ``autograd.Function`` whose ``forward(ctx, ...)`` runs, without gradients; ``""`` if there is none."""
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, BackwardCFunction):
            return type(first).__name__.removesuffix("Backward")
        frame = frame.f_back
    return ""


def _looking_past_autocast(original: _Call) -> _Call:
    """Whether a piece of the split graph switches grad mode, also behind the enters that the split has put first."""

    def switches(node: fx.Node, omit_if_same_with_ambient: bool = False) -> Any:
        found = original(node, omit_if_same_with_ambient)
        if found or node.op != "call_module":
            return found
        graph = getattr(node.graph.owning_module, str(node.target)).graph
        switched = [n for n in graph.nodes if n.target is torch._C._set_grad_enabled]
        if len(switched) != 1:
            return False
        return not omit_if_same_with_ambient or switched[0].args[0] != torch.is_grad_enabled()

    return switches


class _Inference(TorchFunctionMode):
    """Inference mode as grad mode: off, and nothing inside that enables gradients has an effect."""

    inside: ClassVar[list[bool]] = []  # the modes that have been entered, of one export at a time

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        without_effect = func is torch._C._set_grad_enabled and (args[0] or not torch.is_grad_enabled())
        return None if without_effect and self.inside[-1] else func(*args, **(kwargs or {}))


def _enter_as_grad_mode(original: _Call) -> _Call:
    thread = threading.get_ident()

    def __enter__(self: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self)
        before, within = torch.is_grad_enabled(), _Inference()
        _Inference.inside.append(False)
        torch._C._set_grad_enabled(not self.mode)
        _Inference.inside[-1] = bool(self.mode)
        within.__enter__()
        self._entered_as_grad_mode = before, within
        return None

    return __enter__


def _exit_as_grad_mode(original: _Call) -> _Call:
    def __exit__(self: Any, *exception: Any) -> Any:
        entered = vars(self).pop("_entered_as_grad_mode", None)
        if entered is None:
            return original(self, *exception)
        before, within = entered
        within.__exit__(*exception)
        _Inference.inside[-1] = False
        torch._C._set_grad_enabled(before)
        _Inference.inside.pop()
        return None

    return __exit__


def is_taken(name: str) -> bool:
    """Whether no parameter, buffer or child of ``ep.module()`` can have a name: it is an attribute of it already.

    ``ep.module()`` raises then, ``KeyError`` for tensors and ``RuntimeError`` for what is within a child (2.14.1).
    """
    made = fx.GraphModule(nn.Module(), fx.Graph())
    return hasattr(made, name) or name in ("range_constraints", "validate_inputs")
