"""Conditions on sizes: read out of what torch.export says, and never run."""

import re

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.package.guards import conditions, holds

A, B = torch.empty(6, 4), torch.empty(5)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("(L['tensors'][0].size()[0] % 2) == 0", True),
        ("(4*L['x'].size()[0]) == (8*(L['x'].size()[0] // 2))", True),
        ("L['tensors'][0].size()[0] != L['tensors'][1].size()[0]", True),
        ("not (L['tensors'][1].size()[0] >= 5 and -1 < L['tensors'][0].size()[1])", False),
        ("L['tensors'][0].size()[0] % (L['tensors'][1].size()[0] - 5) == 0", False),
    ],
)
def test_conditions_hold_as_in_python(code, expected):
    (condition,) = conditions([code])
    assert holds(condition, [A, B]) is expected


@pytest.mark.parametrize(
    "line",
    ["__import__('os').getpid()", "size(0, 0) == 'x'", "size(0)", "L['x'] is None", "size(0, 0", "1 if 1 else 2"],
)
def test_anything_else_is_refused(line):
    with pytest.raises(ValueError, match=re.escape(line)):
        holds(line, [A])


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, z):
        x = self.linear(x)
        return x.view(-1, 2, 4).mean(1), z.sum() if x.shape[0] == z.shape[0] else -z.sum()


@pytest.mark.parametrize("modes", [["train"], ["eval"]])
def test_sizes_that_the_model_was_not_compiled_for_are_refused(modes, faked, tmp_path):
    auto = torch.export.Dim.AUTO
    model, args = Pairs(), (torch.randn(6, 4), torch.ones(5))
    cm.package(
        model,
        args,
        tmp_path / "x.pt2",
        modes=modes,
        dynamic_shapes=({0: auto}, {0: auto}),
        **({"loss": lambda o: o[0].sum()} if modes == ["train"] else {}),
    )
    packed = cm.load_package(tmp_path / "x.pt2")
    x, z = torch.randn(8, 4), torch.ones(3)
    outputs = packed(x, z)[1] if modes == ["train"] else packed(x, z)
    for ours, theirs in zip(outputs, model(x, z), strict=True):
        torch.testing.assert_close(ours, theirs)
    for x, z in ((torch.randn(3, 4), torch.ones(5)), (torch.randn(6, 4), torch.ones(6))):
        with pytest.raises(cm.CallError, match=r"CM051: .*size\(0, 0\)"):
            packed(x, z)


def test_what_no_call_can_be_asked_for_is_refused(monkeypatch, faked, tmp_path):
    from compile_modes._compat import aoti

    monkeypatch.setattr(aoti, "guards", lambda program: ["L['x'].is_nice()"])
    with pytest.raises(cm.PackageError, match=r"CM026: .*is_nice"):
        cm.package(nn.Linear(4, 2), (torch.ones(3, 4),), tmp_path / "x.pt2", modes=["eval"])
