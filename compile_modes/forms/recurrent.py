"""Recurrent sites as single layers, which torch's decomposition gets right where it gets the whole wrong.

Behind every backend that derives autograd ahead of time, torch takes ``lstm``, ``gru`` and ``rnn_*`` apart, and loses
two things on the way (``_decomp/decompositions.py``): the dropout between layers, for the condition that keeps it is
never true; and the gradients of an LSTM on CPU whose input needs none, for it picks the inference kernel
``mkldnn_rnn_layer`` by looking at the input alone, and AOTAutograd then fails with an AssertionError.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import fx, nn

from compile_modes import _compat
from compile_modes._compat.tracing import trace_in_place_of
from compile_modes.graph.followed import followed_by_autograd
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View

_Layer = Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]
_LSTM = torch.ops.aten.lstm.input


def split_layers(view: View, found: Iterable[Site]) -> tuple[list[tuple[Site, str]], list[Site]]:
    """Replaces, in place, each recurrent site that torch's decomposition would get wrong by what it stands for.

    - One that trains with dropout between layers becomes a call of the same overload per layer, and a dropout of the
      time-major output of every layer but the last. That is eager's own computation (``apply_layer_stack`` in
      ``aten/src/ATen/native/RNN.cpp``), so that equal seeds give equal masks.
    - An LSTM that autograd follows, in either mode, becomes the steps that the decomposition gives where the input
      needs a gradient.

    Others stay as they are, and so does every other node. New nodes carry the meta of the site that they stand for.

    Args:
        view: a pre-autograd graph, captured or Dynamo's, with fake tensors in its meta and modes in place.
        found: its sites.

    Returns:
        The sites that were replaced, each with the form that it has got, and those that train with dropout and could
        not be: those on packed sequences, whose batch sizes no trace knows.
    """
    recurrent = [site for site in found if site.op.family == "rnn" and not site.op.refusal]
    followed = followed_by_autograd(view.bodies) if recurrent else set()
    chosen: list[tuple[Site, str]] = []
    left: list[Site] = []
    edited: set[nn.Module] = set()
    for site in recurrent:
        drops = bool(site.training and site.p and site.read("num_layers") > 1)
        unrolls = site.op.overload is _LSTM and site.node in followed
        if not drops and not unrolls:
            continue
        if site.op.has("batch_sizes"):
            left.append(site)
            continue
        _replace(site, _lstm_steps if unrolls else _one_call(site), float(site.p or 0.0) if drops else 0.0)
        chosen.append((site, "LSTM steps, layer by layer" if unrolls else "layer by layer"))
        edited.add(site.body.module)
    for module in edited:
        _compat.refresh(module)
    return chosen, left


def _replace(site: Site, layer: _Layer, p: float) -> None:
    """Traces the layers of a site on its operands' fake tensors, and puts what comes out into its place."""
    node, operands = site.node, site.node.all_input_nodes
    names = list(site.op.arguments)

    def stack(*values: Any) -> tuple[torch.Tensor, ...]:
        given = dict(zip(operands, values, strict=True))
        return _stack({name: fx.map_arg(site.read(name), given.__getitem__) for name in names}, layer, p)

    traced = trace_in_place_of(node, stack, [_compat.value(operand) for operand in operands])
    graph = node.graph
    inputs = traced.graph.find_nodes(op="placeholder")
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(traced.graph, dict(zip(inputs, operands, strict=True)))
    for user in list(node.users):
        user.replace_all_uses_with(
            results[cast(int, user.args[1])]
        )  # an op with several results has getitem users only
        graph.erase_node(user)
    graph.erase_node(node)


def _stack(arguments: dict[str, Any], layer: _Layer, p: float) -> tuple[torch.Tensor, ...]:
    """One layer after the other, as eager does it."""
    layers = arguments["num_layers"]
    hx, params = arguments["hx"], arguments["params"]
    states = [hx] if isinstance(hx, torch.Tensor) else hx
    directions, per_layer = 2 if arguments["bidirectional"] else 1, len(params) // layers
    value = arguments["input"].transpose(0, 1) if arguments["batch_first"] else arguments["input"]
    last: list[tuple[torch.Tensor, ...]] = []
    for i in range(layers):
        own = [state.narrow(0, i * directions, directions) for state in states]
        single = {
            "input": value,
            "hx": own[0] if isinstance(hx, torch.Tensor) else own,
            "params": params[i * per_layer : (i + 1) * per_layer],
            "num_layers": 1,
            "dropout": 0.0,
            "batch_first": False,
        }
        value, *state = layer({**arguments, **single})
        last.append(tuple(map(_compat.last_state, state, own)))
        if p and i < layers - 1:
            value = torch.ops.aten.dropout.default(value, p, True)
    value = value.transpose(0, 1) if arguments["batch_first"] else value
    return value, *(torch.cat(state, 0) for state in zip(*last, strict=True))


def lstm_in_steps(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """What ``aten.lstm.input`` computes without dropout, in steps of ops that ``torch.func.vmap`` has rules for."""
    names = [argument.name for argument in _LSTM._schema.arguments]
    return _stack(dict(zip(names, args, strict=False)) | kwargs, _lstm_steps, 0.0)


def _one_call(site: Site) -> _Layer:
    return lambda arguments: site.op.overload(**arguments)


def _lstm_steps(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """One layer of an LSTM, step by step, in each direction."""
    directions = 2 if arguments["bidirectional"] else 1
    params = arguments["params"]
    each = len(params) // directions
    outputs, hidden, cells = [], [], []
    for i in range(directions):
        output, (h, c) = _compat.lstm_steps(
            arguments["input"],
            [state[i] for state in arguments["hx"]],
            tuple(params[i * each : (i + 1) * each]),
            arguments["has_biases"],
            reverse=i == 1,
        )
        outputs.append(output)
        hidden.append(h)
        cells.append(c)
    return torch.cat(outputs, -1), torch.stack(hidden), torch.stack(cells)
