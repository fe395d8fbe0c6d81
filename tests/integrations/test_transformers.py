"""Hugging Face's Trainer, with and without the callback."""

import copy
import inspect

import pytest
import torch
from torch import nn

import compile_modes as cm
from oracle import same_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from compile_modes.integrations.transformers import CompileCallback  # noqa: E402  # skipped by name before

LENGTH, WORDS = 8, 40


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


class Tiny(nn.Module):
    """What the Trainer takes for a model: a loss and logits, by the names of its data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bert = nn.Embedding(WORDS, 8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask, labels):
        held = self.drop(self.bert(input_ids)) * attention_mask[..., None]
        logits = self.head(torch.tanh(held).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count, seed=1):
    """Examples with a column that the model doesn't take."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    return [
        {"input_ids": i, "attention_mask": torch.ones(LENGTH, dtype=torch.long), "labels": int(i.sum() % 2), "other": 1}
        for i in ids
    ]


def trainer_of(model, folder, *callbacks, train=10, evaluation=7, **arguments):
    """Batches of 4: the last one of each loop is smaller."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=rows(train),
        eval_dataset=rows(evaluation, seed=2),
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def loops(callback, name):
    return [phase for phase in callback.phases.all if phase.name == name]


def check(build, graphs, tmp_path):
    eager, model = build(), build()
    without = trainer_of(eager, tmp_path / "eager")
    without.train()
    callback = CompileCallback()
    trainer = trainer_of(model, tmp_path / "compiled", callback)
    trainer.train()
    torch.testing.assert_close(losses(trainer), losses(without), rtol=1e-5, atol=1e-6)
    same_state(eager, model, 1e-5)
    assert [phase.graphs for phase in loops(callback, "warm-up")] == [graphs]
    assert [(p.steps, p.graphs) for p in loops(callback, "train")] == [(3, 0)] * 3
    assert [(p.steps, p.graphs) for p in loops(callback, "validation")] == [(2, 0)] * 3
    assert "validation 3" in callback.phases.table()


def test_trains_and_validates_as_without_and_compiles_once(tmp_path, no_inductor):
    check(Tiny, 2, tmp_path)


@pytest.mark.slow
def test_bert_trains_and_validates_as_without(tmp_path, no_inductor):
    check(bert, 3, tmp_path)  # train twice: its first call sets config.problem_type


@pytest.mark.slow
def test_bert_through_inductor(tmp_path):
    check(bert, 3, tmp_path)


@pytest.mark.slow
def test_without_warm_up_or_a_batch_that_varies_the_first_loops_compile_and_no_later_one(tmp_path, no_inductor):
    callback = CompileCallback(warmup=False)
    trainer_of(Tiny(), tmp_path, callback).train()
    assert loops(callback, "warm-up") == []
    first, *later = loops(callback, "validation")
    assert first.graphs >= 1
    assert first.stalled > 0
    assert [phase.graphs for phase in later] == [0, 0]


def test_a_validation_loop_that_compiles_after_the_first_is_told(tmp_path, no_inductor):
    callback = CompileCallback()
    trainer = trainer_of(Tiny(), tmp_path, callback, num_train_epochs=1)
    trainer.train()
    longer = [
        {**row, "input_ids": row["input_ids"][:5], "attention_mask": row["attention_mask"][:5]} for row in rows(4)
    ]
    with pytest.warns(cm.ModeWarning, match=r"^CM958: validation loop 2 compiled 1 graphs"):
        trainer.evaluate(longer)


def test_evaluation_alone_and_a_callback_that_is_added_later(tmp_path, no_inductor):
    model, callback = Tiny(), CompileCallback()
    expected = trainer_of(copy.deepcopy(model), tmp_path / "eager").evaluate()["eval_loss"]
    trainer = trainer_of(model, tmp_path / "compiled", callback)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.predict(rows(3)).predictions.shape == (3, 2)
    assert sum(p.graphs for p in loops(callback, "warm-up")) >= 1
    late = CompileCallback()
    trainer = trainer_of(Tiny(), tmp_path / "late", num_train_epochs=1)
    trainer.add_callback(late)
    trainer.train()
    assert [p.graphs for p in loops(late, "validation")] == [0]


@pytest.mark.slow
def test_accumulated_steps_are_counted_by_batch(tmp_path, no_inductor):
    callback = CompileCallback()
    trainer_of(Tiny(), tmp_path, callback, gradient_accumulation_steps=2, num_train_epochs=1).train()
    assert [p.steps for p in loops(callback, "train")] == [3]


def exported():
    program = torch.export.export(
        Tiny(),
        (),
        {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows(4)])
            for name in ("input_ids", "attention_mask", "labels")
        },
        dynamic_shapes={
            name: {0: torch.export.Dim("batch", min=2)} for name in ("input_ids", "attention_mask", "labels")
        },
    )
    return cm.bind(program)


def test_a_bound_model_has_the_signature_that_keeps_its_columns_and_trains_as_eager(tmp_path, no_inductor):
    eager, bound = Tiny(), exported()
    assert list(inspect.signature(bound.forward).parameters)[:3] == ["input_ids", "attention_mask", "labels"]
    without, callback = trainer_of(eager, tmp_path / "eager"), CompileCallback()
    without.train()
    trainer = trainer_of(bound, tmp_path / "compiled", callback)  # seeds what the training draws
    trainer.train()
    torch.testing.assert_close(losses(trainer), losses(without), rtol=1e-4, atol=1e-5)
    assert [p.graphs for p in loops(callback, "validation")] == [0, 0, 0]


def test_what_is_wrapped_by_torch_compile_is_refused_and_left_alone(tmp_path):
    model = Tiny()
    with pytest.raises(cm.OptionError, match=r"^CM952: OptimizedModule is what torch.compile returns"):
        trainer_of(torch.compile(model, backend="eager"), tmp_path, CompileCallback())
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (["berd"], r"^CM953: the model has no module 'berd'\n.*\n.*names here: 'bert'"),
        (["", "bert"], r"^CM954: 'bert' is a part of ''"),
        ([], "^CM955: Tiny has neither"),
    ],
)
def test_modules_that_can_not_be_compiled_are_refused_and_nothing_is(modules, says, tmp_path):
    model = Tiny()
    with pytest.raises(cm.OptionError, match=says):
        trainer_of(model, tmp_path, CompileCallback(modules))
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_options_that_torch_compile_does_not_take_are_refused_at_once():
    with pytest.raises(cm.OptionError, match=r"^CM951: torch.compile takes no 'dynamik'\n.*\n.*it takes dynamic"):
        CompileCallback(dynamik=True)


def test_accelerate_does_not_know_backends_that_are_registered(tmp_path):
    """The reason for the callback; when this fails, accelerate has taken the change of docs/trainers.md."""
    with pytest.raises(ValueError, match="PT2E_MODES"):
        trainer_of(Tiny(), tmp_path, torch_compile=True, torch_compile_backend="pt2e_modes")


def test_accelerate_in_a_loop_of_ones_own(no_inductor):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    eager = copy.deepcopy(model)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    accelerator = accelerate.Accelerator(cpu=True)
    model.compile(backend="pt2e_modes")
    results = []
    for net in (eager, model):
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
        for seed in range(3):
            torch.manual_seed(seed)
            net.train()
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()
            net.eval()
            with torch.no_grad():
                results.append(net(x))
    torch.testing.assert_close(results[:3], results[3:])
    same_state(eager, model, 1e-5)
