"""Whole models: exported in both modes, trained, evaluated and flipped beside eager PyTorch."""

import copy
import warnings
from collections import Counter

import pytest
import torch

import compile_modes as cm
from compile_modes.graph.dual import DualModule
from oracle import agrees, text
from zoo import prepared

pytestmark = pytest.mark.slow


def against_eager(reference, module, inputs, case, **kwargs):
    names = list(inputs)

    def named(call):
        return lambda *values: call(**dict(zip(names, values, strict=True)))

    agrees(
        reference, module, named(module), list(inputs.values()), oracle=named(reference), tolerance=case.tolerance,
        **kwargs,
    )  # fmt: skip


def test_model(case, row):
    model, inputs = prepared(case)
    reference = copy.deepcopy(model)
    module = cm.export(model, (), inputs)
    found = cm.sites(module)
    row["sites"] = ", ".join(f"{n} {family}" for family, n in sorted(Counter(s.op.family for s in found).items()))
    assert isinstance(module, DualModule) is case.dual
    row["graphs"] = f"two: {module.difference}" if case.dual else "one"
    assert module.state_dict().keys() == model.state_dict().keys()
    everything_is_listed(module, found)
    against_eager(reference, module, inputs, case, flips=2, steps=2)
    row["train and eval against eager"] = "bit-equal" if case.tolerance == 0 else f"within {case.tolerance:g}"
    one_export(reference, case, inputs, row)
    row["round trips"] = round_trips(model, inputs)


def everything_is_listed(module, found):
    shown = cm.explain(module)
    for site in found:
        assert any(str(site.op) in line and (site.owner or "(root)") in line for line in shown.splitlines()), site
        for mode in (True, False):
            assert site.refusal(mode) in shown


def one_export(reference, case, inputs, row):
    """A train export alone, bound: as good wherever Python has decided nothing."""
    if case.dual:
        row["one train export, bound"] = "needs both"
        return
    bound = bind(torch.export.export(copy.deepcopy(reference.train()), (), inputs))
    against_eager(reference, bound, inputs, case, flips=1, steps=1)
    row["one train export, bound"] = "bit-equal" if case.tolerance == 0 else f"within {case.tolerance:g}"


def bind(program):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CM234")  # levit's, which drops a cache
        return cm.bind(program)


def round_trips(model, inputs):
    """Rewrites both exports to eval, train and eval again: the text of the first eval comes back."""
    for mode in (True, False):
        graph = torch.export.export(model.train(mode), (), inputs).module()
        cm.set_mode(graph, False)
        first = text(graph)
        there = cm.set_mode(graph, True)
        assert len(cm.set_mode(graph, False).changed) == len(there.changed)
        assert text(graph) == first
    return "same text"
