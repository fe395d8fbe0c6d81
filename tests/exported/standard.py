"""Programs in one mode, as files of torch.export hold them, beside eager models."""

import copy
import functools
import io

import torch
from torch._ops import HigherOrderOperator, OpOverload

import compile_modes as cm
from graphs import bodies
from oracle import same_steps


def exported(model, x, start, **options):
    with cm.exportable(model):
        return torch.export.export(model.train(start), (x,), **options)


def reloaded(program):
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


def is_standard(program):
    """Whether there is nothing in a program that others don't know, and it passes torch's checks."""
    for body in bodies(program.graph_module):
        for node in body.graph.nodes:
            assert node.op in ("placeholder", "get_attr", "call_function", "output")
            if node.op == "call_function":
                assert (
                    isinstance(node.target, OpOverload | HigherOrderOperator) or node.target.__module__ == "_operator"
                )
                assert "compile_modes" not in str(node.target)
            if node.op in ("placeholder", "call_function"):
                assert "val" in node.meta, node
    program.validate()
    return True


def does_as_eager(program, model, mode, *inputs, steps=3, tolerance=0.0, **kwargs):
    """Trains, or evaluates, a loaded program beside its model; both are left changed."""
    module = reloaded(program).module()
    model.train(mode)
    tied = len(dict(module.named_parameters())) != len(dict(model.named_parameters()))  # torch loads them as two
    same_steps(
        model,
        module,
        functools.partial(module, **kwargs),
        inputs,
        oracle=functools.partial(model, **kwargs),
        steps=steps,
        train=mode,
        gradients=not tied,
        tolerance=tolerance,
    )


def fixed(model, mode, **modes):
    """A model whose modes stay as they are set here."""
    model = copy.deepcopy(model).train(mode)
    for name, module in model.named_modules():
        module.training = modes.get(name.rpartition(".")[2], module.training)
    model.train = lambda mode: model
    return model
