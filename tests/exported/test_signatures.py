"""Every module that the package gives says the names of its arguments: trainers drop the columns that aren't there."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.export import export, unflatten

import compile_modes as cm

X, LABELS = torch.randn(6, 4), torch.arange(6) % 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 2)

    def hidden(self, values):
        return self.drop(torch.relu(self.norm(self.fc(values))))

    def forward(self, values, labels=None):
        return self.head(self.hidden(values)), labels * 1


class Keywords(Net):
    def forward(self, values, *, labels, scale=2.0):
        return self.head(self.hidden(values)) * scale, labels * 1


class Auxiliary(Net):
    def forward(self, values, labels):
        hidden = self.hidden(values)
        return (self.head(hidden), labels * 1, hidden) if self.training else (self.head(hidden), labels * 1)


class Writer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, values, labels):
        if self.training:
            self.seen += 1
        return self.head(self.hidden(values)), labels * 1


def saved(module, folder):
    cm.save(module, folder / "model.pt2")
    return cm.load(folder / "model.pt2")


def program(kind=Net):
    return export(kind(), (X,), {"labels": LABELS})


WAYS = {
    "bound": lambda _: cm.bind(program()),
    "bound, keyword only": lambda _: cm.bind(program(Keywords)),
    "bound of the module": lambda _: cm.bind(program().module()),
    "unflattened": lambda _: cm.bind(unflatten(program())),
    "unflattened, keyword only": lambda _: cm.bind(unflatten(program(Keywords))),
    "unflattened, by position": lambda _: cm.bind(unflatten(export(Net(), (X, LABELS)))),
    "two programs": lambda _: cm.export(Auxiliary(), (X, LABELS)),
    "a copy of two": lambda _: copy.deepcopy(cm.export(Auxiliary(), (X, LABELS))),
    "a file of two": lambda folder: saved(cm.export(Auxiliary(), (X, LABELS)), folder),
    "switches": lambda _: cm.export(Writer(), (X, LABELS)),
    "a copy": lambda _: copy.deepcopy(cm.bind(program(Keywords))),
    "a file": lambda folder: saved(cm.export(Keywords(), (X,), {"labels": LABELS}), folder),
    "adapters": lambda _: adapted(cm.bind(program())),
    "another head": lambda _: cm.replace_head(cm.bind(program()), "head", nn.Linear(8, 2)),
    "baked": lambda _: cm.bake(cm.bind(program())),
    "bound again": lambda _: cm.bind(export(cm.bind(program()), (X,), {"labels": LABELS})),
}


def adapted(module):
    cm.lora(module, targets=("fc",), r=2)
    return module


@pytest.mark.parametrize("way", WAYS)
def test_forward_says_the_names_of_the_export(way, tmp_path):
    module = WAYS[way](tmp_path)
    names = list(inspect.signature(module.forward).parameters)
    assert names[:2] == ["values", "labels"]
    exported = list(inspect.signature(module).parameters)
    assert names[: len(exported)] == exported  # arguments with a default that weren't exported come last
    outputs = module(**{"labels": LABELS, "values": X})
    assert outputs[0].shape == (6, 2)
    assert torch.equal(outputs[1], LABELS)


def test_an_unflattened_module_stays_what_it_was_but_for_its_forward(no_inductor):
    before = unflatten(program())
    kind, module = type(before), cm.bind(before)
    assert module is before
    assert isinstance(module, kind)
    assert type(module).__name__ == kind.__name__
    assert cm.bind(module) is module
    assert type(module).__mro__.count(kind) == 1
    assert "__signature__" not in vars(kind.forward)  # other unflattened modules say what they said
    compiled = torch.compile(module, backend="pt2e_modes")
    for training in (True, False, True, False):
        module.train(training)
        results = []
        for call in (module, compiled):
            torch.manual_seed(0)
            results.append(call(X, labels=LABELS)[0])
        torch.testing.assert_close(*results)
    assert type(cm.bind(unflatten(program()))) is type(module)  # and so is what is compiled
