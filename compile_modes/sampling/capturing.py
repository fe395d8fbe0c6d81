"""A graph of a model in which what shall draw random numbers is in train, and everything else in eval."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes.errors import few
from compile_modes.exported.exporter import Exporter
from compile_modes.forms.recurrent import split_layers
from compile_modes.graph import rewrite
from compile_modes.graph.effects import viewed, written_operands
from compile_modes.graph.finding import find
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View, attribute
from compile_modes.sampling.effects import RANDOM
from compile_modes.sampling.finding import Drawing, fast_path_off


def capture(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], live: Sequence[Drawing]
) -> fx.GraphModule:
    """Exports a model with the modules of ``live`` in train; norms of theirs, too, are in eval in it.

    Args:
        module: the model, not compiled; as it was afterwards.
        args, kwargs: what it is called with; the graph holds for inputs like these.
        live: the modules that draw random numbers in train.

    Returns:
        A graph with the model's own parameters and buffers, under their names.

    Raises:
        ExportError: it can't be exported.
        SampleError: in train, modules of ``live`` do more than draw random numbers.
    """
    names = {drawing.name for drawing in live}
    with Exporter(module, tuple(args), kwargs, None) as exporter, fast_path_off(), _no_autocast():
        root = _module_of(exporter.probe(lambda name: name in names))
        view = View(root)
        trained, written = _others_in_train(view), _written_state(view)
        if trained or written:
            evaluation = View(_module_of(exporter.probe(lambda _: False)))
            rewrite.apply([(site, False) for site in _to_eval(view, evaluation, live)])
            if extra := _written_state(View(root)) - _written_state(evaluation):
                raise _more_than_draws(live, f"it writes {few(sorted(extra))}")
    _own_state(root, module)
    view = View(root)
    split_layers(view, find(view))
    return root


def _module_of(program: ExportedProgram) -> fx.GraphModule:
    return program.module()


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Casts come with the call, by the ops of the graph, as in eager; they are no part of it."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _others_in_train(view: View) -> list[Site]:
    """The sites that are in train and are no random numbers: batch statistics, power iterations."""
    return [site for site in find(view) if site.op.family not in RANDOM and site.training and not site.modeless]


def _to_eval(view: View, evaluation: View, live: Sequence[Drawing]) -> list[Site]:
    """The sites that are in train, and in eval when the model is."""
    ours, theirs = (
        [site for site in find(one) if site.op.family not in RANDOM and not site.modeless] for one in (view, evaluation)
    )
    if [(s.op.family, s.owner) for s in ours] != [(s.op.family, s.owner) for s in theirs]:
        raise _more_than_draws(live, "its norms are others")
    return [site for site, other in zip(ours, theirs, strict=True) if site.training and not other.training]


def _written_state(view: View) -> set[str]:
    """The names of the parameters and buffers that a graph writes."""
    targets = [viewed(value) for node in view.nodes() for value in written_operands(node)]
    statistics = [
        site.read(name) for site in _others_in_train(view) for name in site.op.stats if site.op.new_state(name) is None
    ]
    return {path for value in (*targets, *statistics) if (path := view.state[value]) is not None}


def _more_than_draws(live: Sequence[Drawing], what: str) -> Exception:
    suspects = [drawing for drawing in live if drawing.writes] or live
    return messages.WRITES_IN_TRAIN.error(what=what, owner=few(repr(drawing.names[0]) for drawing in suspects))


def _own_state(root: fx.GraphModule, module: nn.Module) -> None:
    """Gives a graph the very parameters and buffers of the model, so that it reads them as they are at each call."""
    for body in View(root).bodies:
        for node in body.graph.find_nodes(op="get_attr"):
            path = str(node.target)
            held, own = attribute(body.module, path), attribute(module, path)
            if isinstance(held, torch.Tensor) and isinstance(own, torch.Tensor) and held is not own:
                home, _, name = path.rpartition(".")
                owner = body.module.get_submodule(home)
                (owner._parameters if isinstance(own, nn.Parameter) else owner._buffers).pop(name, None)
                setattr(owner, name, own)
