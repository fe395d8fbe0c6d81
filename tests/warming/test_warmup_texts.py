"""What ``warmup`` shows and says, word for word."""

import sys

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from graphs import graphs_compiled
from nets import IMAGE, ConvNet, Parent


def test_the_bar_names_the_steps_on_a_terminal(no_inductor, capsys, monkeypatch):
    call = torch.compile(ConvNet(), backend="pt2e_modes")
    cm.warmup(call, IMAGE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cm.warmup(call, IMAGE)
    assert "2/2" in capsys.readouterr().err
    cm.warmup(call, IMAGE, progress=False)
    assert capsys.readouterr().err == ""


def test_no_bar_without_rich(no_inductor, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cm.warmup(torch.compile(ConvNet(), backend="pt2e_modes"), IMAGE) == 2
    assert capsys.readouterr().err == ""


def says(error, *args, **kwargs):
    with pytest.raises(error) as raised:
        cm.warmup(*args, progress=False, **kwargs)
    return str(raised.value)


def test_what_it_says_of_a_module_that_is_not_compiled():
    assert_expected_inline(
        says(cm.WarmupError, Parent(ConvNet()), IMAGE),
        """\
CM607: nothing in Parent is compiled
  what to do: pass what torch.compile(module, backend="pt2e_modes") returns, or call module.compile() before""",
    )


def test_what_it_says_of_a_lazy_module():
    assert_expected_inline(
        says(cm.WarmupError, torch.compile(nn.Sequential(nn.LazyLinear(3))), torch.ones(2, 2)),
        """\
CM608: a lazy module is not initialised yet
  where: _orig_mod.0.weight
  what to do: call the eager module once""",
    )


def test_what_it_says_of_modes_and_grad_modes(no_inductor):
    call = torch.compile(ConvNet(), backend="pt2e_modes")
    errors = [
        says(cm.OptionError, call, IMAGE, modes=("train", "test")),
        says(cm.OptionError, call, IMAGE, modes=()),
        says(cm.OptionError, call, IMAGE, modes={"*": "off"}),
        says(cm.OptionError, call, IMAGE, grad="no"),
        says(cm.OptionError, call, IMAGE, grad={"test": True}),
        says(cm.OverrideError, call, IMAGE, modes=["train", {"block1.bm": "eval"}]),
    ]
    assert_expected_inline(
        "\n".join(errors),
        """\
CM603: 'test' is not a mode
  where: modes[1]
  what to do: use 'train', 'eval', 'current' or {'layer1*': 'eval'}
CM601: modes is ()
  where: modes
  what to do: pass ("train", "eval")
CM104: 'off' is not a mode
  where: modes[0]['*']
  what to do: use 'train' or 'eval'
CM604: 'no' is not a grad mode
  where: grad
  what to do: use True, False, "inference" or several
CM602: grad has keys ['test']
  where: grad
  what to do: use 'train' and 'eval'
CM605: the pattern 'block1.bm' matches no module
  where: modes[1]
  what to do: names here: 'block1.bn', 'block1', 'block2.bn'""",
    )
    assert graphs_compiled() == 0


def test_what_it_says_of_a_call_that_fails(no_inductor):
    call = torch.compile(ConvNet(), backend="aot_eager")
    message = says(cm.WarmupError, call, torch.ones(6, 3, 8, 8), "too much", modes="eval")
    assert_expected_inline(
        message,
        """\
CM609: the module raised TypeError: ConvNet.forward() takes 2 positional arguments but 3 were given
  where: warm-up in mode 'eval, no_grad'
  what to do: call it with the same arguments, uncompiled; the module is as it was before the warm-up""",
    )
    with pytest.raises(cm.OptionError, match="did you mean"):  # this package's own errors say it all
        cm.warmup(torch.compile(ConvNet(), backend="pt2e_modes", options={"overides": {}}), IMAGE, progress=False)
