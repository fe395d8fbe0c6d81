"""Stages of ``torch.distributed.pipelining``, one after the other in one process; with schedules, see worker.py."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import compile_modes as cm
from composition.models import Block, X
from setups import compile_

pipelining = pytest.importorskip("torch.distributed.pipelining")


class Net(nn.Module):
    """A norm and a dropout in each stage, and one dropout that Python calls, by the flag of the root."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(3, 4), Block(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.second(self.first(x)).mean((2, 3))
        return self.head(nn.functional.dropout(x, 0.3, self.training))


def stages_of(model):
    split = {"second": pipelining.SplitPoint.BEGINNING}
    pipe = pipelining.pipeline(copy.deepcopy(model), (X,), split_spec=split)
    return [pipe.get_stage_module(number) for number in range(pipe.num_stages)]


def test_a_stage_by_itself_stays_in_the_mode_of_its_export():
    """What binding is for; when torch's own stages follow flags, the page on distributed training has to say so."""
    for stage in stages_of(Net().train()):
        assert stage.eval() is stage
        assert all(site.training and not site.bound for site in cm.sites(stage))


@pytest.mark.parametrize("exported_in_train", [True, False])
def test_bound_stages_train_and_evaluate_as_the_eager_model(exported_in_train, no_inductor):
    reference = Net().train(exported_in_train)
    unbound = stages_of(reference)
    with contextlib.nullcontext() if exported_in_train else pytest.warns(cm.ModeWarning, match="^CM232: num_batches_"):
        stages = [cm.bind(stage) for stage in unbound]
    assert {site.owner for site in cm.sites(stages[0])} == {"first.bn", "first.drop"}
    assert {site.owner for site in cm.sites(stages[1])} == {"second.bn", "second.drop", ""}
    ours = nn.ModuleList(stages)
    calls = [compile_(stage) for stage in stages]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (reference, ours)]
    for seed, (training, frozen) in enumerate([(True, False), (False, False), (True, True), (False, True)]):
        reference.train(training)
        ours.train(training)
        if frozen:
            reference.second.bn.eval()
            stages[1].second.bn.eval()
        outputs = []
        for call, optimizer in zip((reference, lambda x: calls[1](calls[0](x))), optimizers, strict=True):
            torch.manual_seed(seed)
            outputs.append(call(X))
            if training:
                optimizer.zero_grad()
                outputs[-1].square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        assert_same_state(reference, stages, counted=exported_in_train)
    assert reference.first.bn.num_batches_tracked == 2
    assert reference.second.bn.num_batches_tracked == 1


def assert_same_state(reference, stages, *, counted):
    """The state of the stages together is that of the model; an eval export has lost what counts batches."""
    ours = {name: value for stage in stages for name, value in stage.state_dict().items()}
    expected = {n: v for n, v in reference.state_dict().items() if counted or not n.endswith("num_batches_tracked")}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)
