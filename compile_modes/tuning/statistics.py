"""``update_bn``: the running statistics of batch norms anew from data, as torch.optim.swa_utils does for eager ones."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.export.unflatten import UnflattenedModule

from compile_modes import _compat, messages
from compile_modes.errors import summary
from compile_modes.graph.cumulative import CUMULATIVE_BATCH_NORM
from compile_modes.graph.dual import DualModule
from compile_modes.graph.edits import attr_node, own
from compile_modes.graph.finding import find
from compile_modes.graph.owners import is_batch_norm, join
from compile_modes.graph.sites import BOUND, Site
from compile_modes.graph.view import View, attribute

_BATCH_NORM = torch.ops.aten.batch_norm.default


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | str | torch.device | None = None) -> list[str]:
    """Computes the running statistics of batch norms anew: the average over all batches of a loader.

    ``torch.optim.swa_utils.update_bn`` looks for modules of torch's classes, which bound modules don't have; this finds
    their norms in the graph, and gives what that gives for the eager model. All norms that follow ``train()`` take
    part, also those that are in eval now, as there. Unlike there, each submodule is in its own mode afterwards, and if
    a call raises, all buffers are as they were. Momentum stays what it is. Compiled modules run uncompiled here.

    Args:
        loader: batches, each a tensor or a list or tuple whose first item is one.
        model: a bound module, or an eager one around some.
        device: where to move batches to before each call.

    Returns:
        The names of the norms.

    Raises:
        TuningError: a norm can't be averaged, or the module can't be copied. Nothing has been changed then.
    """
    model = getattr(model, "_orig_mod", model)
    tensors = [*model.parameters(), *model.buffers()]
    try:  # of the graphs alone; the state is the model's own
        working = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # whatever an attribute of a module raises when it is copied
        raise messages.NOT_COPIED.error(kind=type(model).__name__, error=summary(error)) from error
    names = _prepare(working)
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for name in names:
            norm: Any = model.get_submodule(name)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()
        for batch in loader if names else ():
            value = batch[0] if isinstance(batch, list | tuple) else batch
            working(value if device is None else value.to(device))
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    return names


def _prepare(working: nn.Module) -> list[str]:
    """Puts a module into train, with a cumulative average in each norm; returns the names of the norms."""
    for module in working.modules():
        module._modules.update({name: getattr(m, "_orig_mod", m) for name, m in module._modules.items()})
    working.train()
    names = []
    for path, module in list(working.named_modules()):
        if isinstance(module, _compat.BATCH_NORM) and module.track_running_stats and module.running_mean is not None:
            module.momentum = None
            names.append(path)
        for root in _graphs(module):
            names += [join(path, name) for name in _average(root)]
    return list(dict.fromkeys(names))


def _graphs(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, DualModule):
        return [module.program(True)]
    bound = isinstance(module, fx.GraphModule) and bool(module.meta.get(BOUND))
    return [module] if bound or isinstance(module, UnflattenedModule) else []


def _average(root: nn.Module) -> list[str]:
    """Has the norms of a graph take a cumulative average; returns the modules that hold their statistics."""
    view = View(root)
    view = View(root) if own(view) else view
    homes, edited = [], set()
    for site in find(view):
        if site.op.family != "batch_norm" or site.modeless or not site.training or is_batch_norm(site.node) is False:
            continue
        path = view.state[site.read(site.op.stats[0])]
        if path is None:
            continue  # statistics that nothing holds are no module's
        home = path.rpartition(".")[0]
        if site.node.target is _BATCH_NORM:
            edited |= _replace(site, home)
        elif site.node.target is not CUMULATIVE_BATCH_NORM:
            raise messages.NORM_NOT_AVERAGED.error(norm=home, op=site.op, where=str(site))
        homes.append(home)
    for module in edited:
        _compat.refresh(module)
    return homes


def _replace(site: Site, home: str) -> set[nn.Module]:
    """Puts this package's operator, which steps the counter as well, into the place of a norm and its step."""
    body, node, edited = site.body, site.node, {site.body.module}
    holder: Any = body.view.root.get_submodule(home)
    counter = attribute(holder, "num_batches_tracked")
    if counter is None:
        counter = holder.num_batches_tracked = torch.zeros((), dtype=torch.long, device=holder.running_mean.device)
    name = f"_count_{len(vars(body.module))}"
    body.module.__dict__[name] = counter
    if site.step is not None:
        stepped = body.view.body(site.step)
        site.step.replace_all_uses_with(site.step.all_input_nodes[0])
        site.step.graph.erase_node(site.step)
        edited.add(stepped.module)
    count = attr_node(body, name)
    given = {
        key: site.read(key) for key in ("input", "weight", "bias", *site.op.stats, "training", "eps", "cudnn_enabled")
    }
    arguments = {**given, "num_batches_tracked": count}
    names = [argument.name for argument in CUMULATIVE_BATCH_NORM._schema.arguments]
    with body.graph.inserting_before(node):
        averaged = body.graph.call_function(CUMULATIVE_BATCH_NORM, tuple(arguments[n] for n in names))
    node.replace_all_uses_with(averaged)
    body.graph.erase_node(node)
    return edited
