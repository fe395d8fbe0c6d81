"""Drop-ins for ``torch.ao.quantization`` / torchao: same names and contracts, flags instead of pattern replacement."""

from typing import Any, TypeVar

from torch import fx, nn

from compile_modes.exported.binding import bind

_M = TypeVar("_M", bound=nn.Module)


def model_is_exported(m: Any) -> bool:
    """Whether ``m`` is a GraphModule that came from ``torch.export``, and not one that was only traced by FX."""
    return isinstance(m, fx.GraphModule) and any("val" in node.meta for node in m.graph.nodes)


def move_exported_model_to_eval(model: _M) -> _M:
    """Puts an exported model into eval mode, as ``model.eval()`` does for an eager one; returns it.

    Binds the model if it isn't bound. Calling it again changes nothing. Raises what :func:`compile_modes.bind` raises.
    """
    return allow_exported_model_train_eval(model).eval()


def move_exported_model_to_train(model: _M) -> _M:
    """Puts an exported model into train mode, as ``model.train()`` does for an eager one; returns it.

    Binds the model if it isn't bound. Calling it again changes nothing. Raises what :func:`compile_modes.bind` raises.
    """
    return allow_exported_model_train_eval(model).train()


def allow_exported_model_train_eval(model: _M) -> _M:
    """Makes ``train()`` and ``eval()`` work on an exported model, and on its submodules; returns it.

    Unlike torchao's it leaves the mode as it is, keeps every literal, and the methods return the model.
    """
    bound: _M = bind(model)
    return bound
