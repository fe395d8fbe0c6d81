import pytest
import torch
from expecttest import assert_expected_inline

import compile_modes as cm
from nets import IMAGE, ConvNet


def test_what_bind_says_of_an_eager_module():
    model = ConvNet()
    with pytest.raises(cm.BindError) as error:
        cm.bind(model)
    assert_expected_inline(
        str(error.value),
        """\
CM201: ConvNet has no graph of ATen ops
  what to do: export it first: torch.export.export(model, args); an eager module needs no binding""",
    )


def test_what_an_override_says_that_matches_nothing():
    gm = torch.export.export(ConvNet(), (IMAGE,)).module()
    code = gm.code
    with pytest.raises(cm.OverrideError) as error:
        cm.set_mode(gm, False, overrides={"block1.bm": "train"})
    assert_expected_inline(
        str(error.value),
        """\
CM109: the pattern 'block1.bm' matches no mode-dependent site
  where: overrides['block1.bm']
  what to do: owners here: 'block1.bn', 'block2.bn', 'block1.drop'""",
    )
    assert gm.code == code


def test_what_a_misspelt_option_says(no_inductor):
    compiled = torch.compile(ConvNet(), backend="pt2e_modes", options={"overides": {"block1.bn": "eval"}})
    with pytest.raises(cm.OptionError) as error:
        compiled(IMAGE)
    # Dynamo adds a line on its own verbosity to whatever a backend raises.
    assert_expected_inline(
        str(error.value).split("\n\n")[0],
        """\
CM122: 'overides' is an option neither of pt2e_modes nor of Inductor
  where: options
  what to do: did you mean 'overrides', 'modes'?""",
    )


def test_errors_name_cause_place_and_remedy():
    error = cm.OptionError("the cause", where="the place", remedy="the remedy")
    assert (error.cause, error.where, error.remedy) == ("the cause", "the place", "the remedy")
    assert isinstance(error, cm.CompileModesError)
