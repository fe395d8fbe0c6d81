"""Lightning's Trainer, with and without the callback."""

import copy
import logging

import pytest
import torch
from torch import nn

import compile_modes as cm
from oracle import same_state

lightning = pytest.importorskip("lightning.pytorch")
from compile_modes.integrations.lightning import CompileCallback  # noqa: E402  # skipped by name before

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("error::compile_modes.ModeWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Lit(lightning.LightningModule):
    """A net of two parts that the steps call, and a loss without parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.loss = nn.CrossEntropyLoss()
        self.validated = []

    def step(self, batch):
        x, y = batch
        return self.loss(self.head(self.net(x)), y)

    def training_step(self, batch, index):
        loss = self.step(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.validated.append(self.step(batch).item())

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.head(self.net(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithForward(Lit):
    """Calls itself."""

    def forward(self, x):
        return self.head(self.net(x))

    def step(self, batch):
        return self.loss(self(batch[0]), batch[1])


def loader(count, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch)


def trainer_of(folder, *callbacks, **arguments):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def fit(folder, module, *callbacks, **arguments):
    torch.manual_seed(3)
    trainer_of(folder, *callbacks, **arguments).fit(module, loader(10), loader(7, seed=2))
    return module


def loops(callback, name):
    return [(p.steps, p.graphs) for p in callback.phases.all if p.name == name]


@pytest.mark.every(8)
@pytest.mark.parametrize("kind", [Lit, WithForward])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_trains_and_validates_as_without_and_compiles_once(kind, sanity, inference_mode, tmp_path, no_inductor):
    arguments = {"num_sanity_val_steps": sanity, "inference_mode": inference_mode}
    callback = CompileCallback()
    eager, module = fit(tmp_path, kind(), **arguments), fit(tmp_path, kind(), callback, **arguments)
    torch.testing.assert_close(module.validated, eager.validated, rtol=1e-5, atol=1e-6)
    same_state(eager, module, 1e-5)
    graphs = sum(p.graphs for p in callback.phases.all if p.name == "warm-up")
    assert graphs == (2 if kind is WithForward else 4)  # each of train and eval; Lit has two parts
    assert loops(callback, "train") == [(3, 0)] * 3
    assert loops(callback, "validation") == [(2, 0)] * (4 if sanity else 3)


@pytest.mark.slow
def test_bf16_as_without(tmp_path, no_inductor):
    callback = CompileCallback()
    arguments = {"precision": "bf16-mixed", "num_sanity_val_steps": 0}
    eager, module = fit(tmp_path, Lit(), **arguments), fit(tmp_path, Lit(), callback, **arguments)
    torch.testing.assert_close(module.validated, eager.validated, rtol=2e-2, atol=2e-2)
    assert loops(callback, "validation") == [(2, 0)] * 3


def test_frozen_parts_stay_frozen_through_the_warm_up(tmp_path, no_inductor):
    class Frozen(Lit):
        def on_train_epoch_start(self):
            self.net[1].eval()

    callback = CompileCallback()
    eager, module = fit(tmp_path, Frozen()), fit(tmp_path, Frozen(), callback)
    same_state(eager, module, 1e-5)
    assert loops(callback, "train") == [(3, 0)] * 3


def test_test_and_predict_and_validate_without_a_training(tmp_path, no_inductor):
    module, callback = Lit(), CompileCallback()
    eager = copy.deepcopy(module)
    for one in (eager, module):
        trainer = trainer_of(tmp_path, *([callback] if one is module else []))
        trainer.validate(one, loader(7), verbose=False)
        trainer.test(one, loader(7), verbose=False)
        one.predicted = trainer.predict(one, loader(7))
    torch.testing.assert_close(module.validated, eager.validated)
    torch.testing.assert_close(module.predicted, eager.predicted)
    assert loops(callback, "test") == loops(callback, "predict") == [(2, 0)]


def test_a_bound_net(tmp_path, no_inductor):
    def with_bound():
        module = Lit()
        shapes = ({0: torch.export.Dim("batch", min=2)},)
        module.net = cm.bind(torch.export.export(module.net, (torch.randn(4, 4),), dynamic_shapes=shapes))
        return module

    callback = CompileCallback()
    eager, module = fit(tmp_path, Lit()), fit(tmp_path, with_bound(), callback)
    torch.testing.assert_close(module.validated, eager.validated, rtol=1e-5, atol=1e-6)
    assert loops(callback, "validation")[1:] == [(2, 0)] * 3


@pytest.mark.slow
def test_what_is_never_called_is_told(tmp_path, no_inductor):
    class Unused(Lit):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)

    with pytest.warns(cm.ModeWarning, match="^CM956: 'other' was compiled, and no"):
        fit(tmp_path, Unused(), CompileCallback(), max_epochs=1)


def test_eval_that_can_not_be_called_as_train_is_told_and_changes_nothing(tmp_path, no_inductor):
    class Net(nn.Linear):
        def forward(self, x, more=None):
            if not self.training and more is not None:
                raise ValueError("not in eval")
            return super().forward(x)

    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.head = Net(8, 2)

        def step(self, batch):
            more = batch[0] if self.training else None
            return self.loss(self.head(self.net(batch[0]), more), batch[1])

    callback = CompileCallback(modules=["head"])
    with pytest.warns(cm.ModeWarning, match=r"^CM957: eval could not be warmed up .*CM609"):
        module = fit(tmp_path, Two(), callback, num_sanity_val_steps=0)
    eager = fit(tmp_path, Two(), num_sanity_val_steps=0)
    torch.testing.assert_close(module.validated, eager.validated, rtol=1e-5, atol=1e-6)
    assert loops(callback, "validation")[1:] == [(2, 0)] * 2


def test_a_model_without_parts_is_refused(tmp_path):
    class Bare(Lit):
        def __init__(self):
            super().__init__()
            del self.net, self.head
            self.weight = nn.Parameter(torch.ones(4, 2))

    with pytest.raises(cm.OptionError, match=r"^CM955: Bare has neither"):
        fit(tmp_path, Bare(), CompileCallback())
