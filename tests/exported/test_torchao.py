import copy

import pytest
import torch
from torch import fx, nn

import compile_modes as cm
from nets import IMAGE, ConvNet
from oracle import agrees, literals, same_step, text


def exported(start=True):
    reference = ConvNet()
    return reference, torch.export.export(copy.deepcopy(reference).train(start), (IMAGE,)).module()


def test_model_is_exported():
    assert cm.model_is_exported(exported()[1])
    assert not cm.model_is_exported(ConvNet())
    assert not cm.model_is_exported(fx.symbolic_trace(nn.Linear(2, 2)))


@pytest.mark.parametrize("start", [True, False])
def test_moves_equal_eager_and_keep_literals(start):
    reference, model = exported(start)
    before = literals(model)
    for _ in range(3):
        assert cm.move_exported_model_to_eval(model) is model
        assert literals(model) == before
        assert torch.equal(model(IMAGE), reference.eval()(IMAGE))
        assert cm.move_exported_model_to_train(model) is model
        same_step(reference.train(), model, inputs=[IMAGE], tolerance=0.0)
    assert literals(model) == before


@pytest.mark.parametrize("move", [cm.move_exported_model_to_eval, cm.move_exported_model_to_train])
def test_moves_are_idempotent(move):
    _, model = exported()
    graphs = text(move(model))
    assert text(move(model)) == graphs


def test_allow_makes_train_and_eval_work_and_changes_no_mode():
    reference, model = exported(False)
    assert cm.allow_exported_model_train_eval(model) is model
    assert not model.training
    agrees(reference, model, inputs=[IMAGE], tolerance=0.0)
