import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from compile_modes.graph.functional import is_kept, kept_call
from graphs import sites

X = torch.randn(4, 4)


def test_every_function_with_a_mode_has_a_row():
    graph = fx.Graph()
    missing = []
    for name, function in vars(F).items():
        if not inspect.isfunction(function) or function.__module__ != "torch.nn.functional" or name.startswith("_"):
            continue
        with_mode = {"training", "use_input_stats", "train"} & inspect.signature(function).parameters.keys()
        row = kept_call(graph.call_function(function))
        if (row is not None) != bool(with_mode):
            missing.append(name)
        assert row is None or is_kept(row)
    assert not missing


@pytest.mark.parametrize(
    ("function", "family", "mode"),
    [
        (lambda x: F.dropout(x, 0.2), "dropout", True),
        (lambda x: F.dropout(x, 0.2, False), "dropout", False),
        (lambda x: F.batch_norm(x, x[0], x[1]), "batch_norm", False),
        (lambda x: F.batch_norm(x, x[0], x[1], training=True), "batch_norm", True),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm", None),
        (lambda x: torch.dropout(x, 0.2, True), "dropout", True),
        (lambda x: torch.feature_alpha_dropout(x, 0.2, False), "dropout", False),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "attention", True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "attention", False),
        (lambda x: torch.rnn_relu(x, x, [x], True, 1, 0.2, True, False, False), "rnn", None),
    ],
)
def test_modes_are_read_from_calls(function, family, mode):
    (site,) = sites(fx.symbolic_trace(function))
    assert (site.op.family, site.training) == (family, mode)
    if not site.modeless:
        assert "kept as Dynamo recorded it" in site.refusal(mode is not True)
