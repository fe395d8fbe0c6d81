"""Which mode a baked program is in: asked for, overridden, present, or refused."""

import copy
import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import compile_modes as cm
from compile_modes.exported.programs import baked
from exported.standard import does_as_eager, exported, fixed, is_standard
from nets import (
    IMAGE,
    TOKENS,
    VECTORS,
    Attention,
    Auxiliary,
    ConvNet,
    EveryFlag,
    MixedMask,
)  # fmt: skip
from oracle import same_state, text


def test_an_override_decides_over_the_mode_and_over_what_is_hard_coded():
    model = ConvNet()
    overrides = {"*.bn": "eval", "drop": "eval", "*drop": "train"}
    result = baked(exported(model, IMAGE, True), True, overrides)
    frozen = fixed(model, True, bn=False)
    frozen.drop.training = False
    does_as_eager(result, frozen, True, IMAGE)

    module = cm.export(EveryFlag(), (VECTORS,))
    assert [site.training for site in cm.sites(baked(module, False))] == [False, True, False, True, True]
    assert [site.training for site in cm.sites(baked(module, False, {"": "eval"}))] == [False] * 6
    assert [site.training for site in cm.sites(baked(module, True, {"": "train"}))] == [
        True
    ] * 6  # the mask is no call any more


def test_present_modes_and_weights_of_a_module_are_written():
    model = ConvNet()
    module = cm.export(model, (IMAGE,))
    reference = copy.deepcopy(model)
    for m in (module, reference):
        m.train()
        m.block1.eval()
        for parameter in m.parameters():
            parameter.data.add_(0.01)
    code = module.code
    does_now = baked(torch.compile(module))
    assert module.code == code
    frozen = copy.deepcopy(reference)
    frozen.train = lambda mode: frozen
    does_as_eager(does_now, frozen, True, IMAGE)
    same_state(reference, module, 0.0)
    module.half()
    with pytest.raises(cm.BindError) as error:
        baked(module)
    assert_expected_inline(
        str(error.value),
        """\
CM210: the program was exported with a torch.float32 of shape (4,) on cpu, the module has a torch.float16 of shape (4,) on cpu
  where: block1.bn.running_mean
  what to do: export again after changing dtypes, shapes or devices""",  # noqa: E501
    )


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.every(2)
def test_of_two_programs_the_one_of_the_mode_is_written(mode):
    model = Auxiliary()
    module = cm.export(model, (IMAGE,))
    does_as_eager(baked(module, mode), copy.deepcopy(model), mode, IMAGE)
    result = baked(module, mode, {"*.bn": "eval" if mode else "train"})
    assert is_standard(result)
    does_as_eager(result, fixed(model, mode, bn=not mode), mode, IMAGE)
    for present in (True, False):
        assert text(baked(module.train(present)).module()) == text(baked(module, present).module())


@pytest.mark.parametrize("mode", [True, False])
def test_constants_of_two_programs_that_share_a_name(mode):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.2)

        def forward(self, x):
            return self.drop(self.bn(x)) + torch.tensor([1.0 + self.training])

    model = nn.Sequential(Constant())
    result = baked(cm.export(model, (VECTORS,)), mode, {"0.bn": "eval" if mode else "train"})
    does_as_eager(result, fixed(model, mode, bn=not mode), mode, VECTORS)


REFUSALS = {
    "stuck": (lambda: exported(Attention(), TOKENS, False), True, None),
    "override": (lambda: exported(Attention(), TOKENS, False), None, {"": "train"}),
    "unclear": (lambda: exported(MixedMask(), VECTORS, True), False, None),
    "no-match": (lambda: exported(ConvNet(), IMAGE, True), None, {"block1.bm": "eval"}),
    "no-program": (lambda: cm.bind(exported(ConvNet(), IMAGE, True).module()), True, None),
    "edited": (lambda: cm.bake(cm.bind(exported(ConvNet(), IMAGE, True))), True, None),
}


def test_error_texts():
    said = []
    for name, (build, mode, overrides) in REFUSALS.items():
        with pytest.raises(cm.CompileModesError) as error:
            baked(build(), mode, overrides)
        short = re.sub("dropout_p is 0.*", "dropout_p is 0 ...", str(error.value))
        said.append(f"{name}: {type(error.value).__name__}: {short}")
    assert_expected_inline(
        "\n".join(said),
        """\
stuck: BindError: CM211: something can't be put into the mode that was asked for, or may not be right there:
CM230: 1 sites keep their exported mode and will not follow train() and eval():
  scaled_dot_product_attention (owner ''): CM713: dropout_p is 0 ...
  what to do: export in train mode, which keeps what they need
  what to do: as said there, or pass allow_stuck=True to leave it as it is
override: OverrideError: CM136: overrides name sites that can't be put into that mode:
  scaled_dot_product_attention (aten.scaled_dot_product_attention.default, owner '', eval): CM713: dropout_p is 0 ...
  what to do: leave these sites out, or pass allow_stuck=True to leave them as they are
unclear: BindError: CM211: something can't be put into the mode that was asked for, or may not be right there:
CM235: random numbers of '' are drawn in both modes: one export can't tell whether they depend on mode.
  what to do: compile_modes.export(model, args), which can; or keep=[owner] if they don't
  what to do: as said there, or pass allow_stuck=True to leave it as it is
no-match: OverrideError: CM109: the pattern 'block1.bm' matches no mode-dependent site
  where: overrides['block1.bm']
  what to do: owners here: 'block1.bn', 'block2.bn', 'block1.drop'
no-program: BindError: CM208: GraphModule was not made from an ExportedProgram by bind(), nor by export()
  what to do: pass the ExportedProgram itself, or bind() it and pass the result
edited: BindError: CM209: the module's graph was edited after it was bound
  what to do: pass a module that bind() returned""",
    )


def test_what_is_stuck_is_written_on_request():
    program = exported(Attention(), TOKENS, False)
    with pytest.warns(cm.ModeWarning, match="its p is lost"):
        result = baked(program, True, allow_stuck=True)
    assert [site.training for site in cm.sites(result)] == [False, True]
    assert baked(program, False) is program  # in that mode already, and that it can't leave it is no matter
