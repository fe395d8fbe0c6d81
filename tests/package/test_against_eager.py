"""Packages compiled by AOTInductor, trained and evaluated in a new process without the model's code, against eager."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compile_modes as cm
from package.conftest import write_cnn
from package.packages import BATCH, Cnn, Recurrent, cross_entropy, images
from package.worker import OPTIMIZERS

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("worker.py")


def write_recurrent(path):
    torch.manual_seed(0)
    cm.package(
        Recurrent(),
        (torch.randn(4, 5, 6),),
        path,
        loss=cross_entropy,
        targets=(torch.zeros(4, dtype=torch.long),),
        dynamic_shapes=({0: BATCH},),
    )


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    more = {"vocab_size": 100, "num_labels": 4, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **no_dropout, **more))


def write_bert(path):
    args, targets = tokens(8, 0)
    cm.package(bert(), args, path, loss=cross_entropy, targets=targets, dynamic_shapes=({0: BATCH}, {0: BATCH}))


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(12) < torch.randint(4, 13, (count, 1), generator=generator)).long()
    ids = torch.randint(0, 100, (count, 12), generator=generator)
    return (ids, mask), (torch.randint(0, 4, (count,), generator=generator),)


def sequences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 5, 6, generator=generator),), (torch.randint(0, 4, (count,), generator=generator),)


def pictures(count, seed):
    image, target = images(count, seed)
    return (image,), (target,)


def seeded(make):
    torch.manual_seed(0)
    return make()


CASES = {
    "cnn": (write_cnn, lambda: seeded(Cnn), pictures),
    "recurrent": (write_recurrent, lambda: seeded(Recurrent), sequences),
    "bert": (write_bert, bert, tokens),
}


def eager(model, batches, optimizer):
    """What the worker does, with the model."""
    stepper = OPTIMIZERS[optimizer](model.train().parameters())
    losses, evaluated = [], []
    for step, (args, targets) in enumerate(batches):
        stepper.zero_grad()
        loss = cross_entropy(model(*args), *targets)
        loss.backward()
        stepper.step()
        losses.append(loss.detach())
        if step % 10 == 9:
            with torch.no_grad():
                evaluated.append(model.eval()(*args)["logits"])
            model.train()
    return torch.stack(losses), evaluated


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_in_a_process_without_the_model_equal_eager(name, compiled, tmp_path):
    write, make, batch = CASES[name]
    model = make()  # skips where a library is missing
    path = compiled(name, write)
    batches = [batch(8 - step % 3, step) for step in range(50)]
    torch.save(batches, tmp_path / "batches.pt")
    root = str(Path(cm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(WORKER), str(path), str(tmp_path / "batches.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env=environment, timeout=200)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for optimizer in OPTIMIZERS:
        model = make()
        losses, evaluated = eager(model, batches, optimizer)
        torch.testing.assert_close(found[optimizer]["losses"], losses, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[optimizer]["evaluated"], evaluated, atol=1e-5, rtol=1e-5)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found[optimizer]["state"][key], value, atol=1e-5, rtol=1e-5)
        make().load_state_dict(found[optimizer]["state"])
    load, first = found["sgd"]["times"].tolist()
    assert first <= 0.1, f"the first call took {first:.3f} s"
    assert load <= 2, f"loading took {load:.3f} s"


def test_a_file_is_as_large_as_its_code_and_its_weights(compiled):
    import zipfile

    path = compiled("cnn", write_cnn)
    with zipfile.ZipFile(path) as archive:
        code = sum(i.file_size for i in archive.infolist() if "/data/aotinductor/" in i.filename)
        weights = sum(i.file_size for i in archive.infolist() if "/data/weights/" in i.filename)
        count = len(archive.infolist())
    parameters = {id(t): t.nbytes for t in Cnn().state_dict(keep_vars=True).values()}
    assert weights <= sum(parameters.values()) + 64
    assert path.stat().st_size <= code + weights + 12_000 + 300 * count  # what says what is where, and the zip itself
