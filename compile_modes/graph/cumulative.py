"""Batch norm with ``momentum=None``, a cumulative average, as an operator that graphs can hold.

Eager divides by ``float(num_batches_tracked)``, a number that depends on data: no train graph can hold it, and an eval
graph writes ``momentum=0.0`` in its place. The operator here divides by the tensor.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compile_modes import _compat

_LIBRARY = torch.library.Library("compile_modes", "DEF")
_LIBRARY.define(
    "cumulative_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!) num_batches_tracked, bool training, float eps, bool cudnn_enabled) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def cumulative_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    training: bool,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Eager's statements, the counter's step among them, in terms of ``aten.batch_norm``."""
    if not training:
        return torch.batch_norm(input, weight, bias, running_mean, running_var, False, 0.0, eps, cudnn_enabled)
    num_batches_tracked.add_(1)
    # Momentum 1 turns the copies into the statistics of this batch, which the kernel has at hand. An empty batch
    # leaves them as they are, and so the running statistics, as eager does.
    mean, var = running_mean.clone(), running_var.clone()
    output = torch.batch_norm(input, weight, bias, mean, var, True, 1.0, eps, cudnn_enabled)
    _move(running_mean, mean, num_batches_tracked)
    _move(running_var, var, num_batches_tracked)
    return output


def _move(running: Tensor, batch: Tensor, count: Tensor) -> None:
    dtype = torch.promote_types(running.dtype, torch.float32)  # float16 ends at batch 65504
    running.copy_(running.to(dtype).lerp(batch.to(dtype), count.to(dtype).reciprocal()))


# Composite, as aten.batch_norm is: training IR keeps the operator whole, and autograd, decompositions and Inductor see
# what it is made of.
_LIBRARY.impl("cumulative_batch_norm", cumulative_batch_norm, "CompositeImplicitAutograd")

CUMULATIVE_BATCH_NORM = torch.ops.compile_modes.cumulative_batch_norm.default


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[nn.Module]:
    """Lets a model with ``momentum=None`` batch norms be exported or compiled whole, in both modes.

    For its duration, each such batch norm of ``model`` calls ``compile_modes::cumulative_batch_norm``, which computes
    what eager computes and which :func:`compile_modes.bind` can switch. Everything else is left alone, among it batch
    norms whose ``forward`` is their own, lazy ones that have seen no input, and SyncBatchNorm while it synchronises.
    Programs that are saved to a file need ``import compile_modes`` before they are loaded.

    >>> with exportable(nn.Sequential(nn.BatchNorm1d(2, momentum=None))) as model:
    ...     program = torch.export.export(model.train(), (torch.randn(3, 2),))

    Args:
        model: an eager module; put back on the way out, also after an exception.

    Returns:
        A context manager that gives ``model``.
    """
    replaced = [module for module in model.modules() if is_cumulative(module)]
    try:
        for module in replaced:
            # On the instance: the class, and with it nn_module_stack and other models, stays as it is.
            module.__dict__["forward"] = types.MethodType(_forward, module)
        yield model
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def is_cumulative(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose forward is torch's own and takes a cumulative average in train."""
    if not isinstance(module, _compat.BATCH_NORM) or "forward" in module.__dict__:
        return False
    state = (module.running_mean, module.running_var, module.num_batches_tracked)
    return (
        type(module).forward in (_compat.BATCH_NORM.forward, nn.SyncBatchNorm.forward)
        and module.momentum is None
        and module.track_running_stats
        and all(isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) for tensor in state)
    )


def _forward(module: Any, input: Tensor) -> Tensor:
    """``forward`` of a batch norm, with the operator in place of ``torch.batch_norm``."""
    if isinstance(module, nn.SyncBatchNorm):
        if _synchronises(module):
            return nn.SyncBatchNorm.forward(module, input)
        module._check_non_zero_input_channels(input)
    module._check_input_dim(input)
    if module.training:
        _compat.check_batch_size(input.size())
    output: Tensor = CUMULATIVE_BATCH_NORM(
        input,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        module.training,
        module.eps,
        torch.backends.cudnn.enabled,
    )
    return output


def _synchronises(module: nn.SyncBatchNorm) -> bool:
    distributed = torch.distributed
    return module.training and distributed.is_available() and distributed.is_initialized()
