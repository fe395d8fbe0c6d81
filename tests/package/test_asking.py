"""Which modes are asked for, and which flags they are."""

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.package.asking import asked, deciders, submodules, vectors
from nets import IMAGE, Auxiliary
from package.packages import Small

X = torch.randn(6, 4)


def test_names_are_modes_of_all_submodules():
    assert asked(("train", "eval")) == {"train": {"*": "train"}, "eval": {"*": "eval"}}
    assert asked({"mc": {"drop": "train"}}) == {"mc": {"drop": "train"}}


@pytest.mark.parametrize(
    ("modes", "code"),
    [
        ("train", "CM001"),
        ((), "CM001"),
        (3, "CM001"),
        (["mc"], "CM003"),
        ({"a/b": "train"}, "CM002"),
        ({3: "train"}, "CM002"),
        ({"train": {"*": "on"}}, "CM104"),
    ],
    ids=str,
)
def test_what_is_no_mode_is_refused(modes, code):
    with pytest.raises(cm.OptionError) as error:
        asked(modes)
    assert error.value.code == code


def test_flags_of_each_mode_by_the_first_glob_that_matches():
    bound = cm.export(Small(), (X,))
    assert deciders(bound) == ["", "bn", "drop"]
    found = vectors(bound, asked({"train": "train", "mc": {"drop": "train", "*": "eval"}, "some": {"b*": "train"}}))
    assert found["train"] == {"": True, "first": True, "bn": True, "drop": True}
    assert found["mc"] == {"": False, "first": False, "bn": False, "drop": True}
    assert found["some"] == {"": False, "first": False, "bn": True, "drop": False}


def test_globs_that_name_nothing_and_modes_that_are_one_are_refused():
    bound = cm.export(Small(), (X,))
    with pytest.raises(cm.OverrideError, match="CM109"):
        vectors(bound, asked({"mc": {"dorp": "train"}}))
    with pytest.raises(cm.OptionError, match=r"CM004.*'eval' and 'same'"):
        vectors(bound, asked({"eval": "eval", "same": {"first": "train"}}))


def test_two_programs_and_shared_submodules_have_their_flags_once():
    assert "" in deciders(cm.export(Auxiliary(), (IMAGE,)))
    shared = nn.Dropout(0.5)
    bound = cm.export(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared), (X,))
    names = submodules(bound)
    assert set(deciders(bound)) <= set(names.values())
