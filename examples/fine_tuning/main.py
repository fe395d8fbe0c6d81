"""Fine-tunes an exported classifier whose source isn't at hand: from five digits to all ten, and on to onnxruntime.

    pip install "compile_modes[tuning]"
    python examples/fine_tuning/main.py

A new head, frozen norms, LoRA beside convolutions and linears; trained, evaluated, saved, merged, baked, converted.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import compile_modes as cm

HERE = Path(__file__).parent


def data() -> tuple[torch.Tensor, ...]:
    """Images (n, 1, 8, 8) in [0, 1] and labels, for training and for evaluation."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    rows = train_test_split(range(len(x)), test_size=0.25, stratify=labels, random_state=0)
    return x[rows[0]], y[rows[0]], x[rows[1]], y[rows[1]]


def tuned(path: Path) -> nn.Module:
    """The published program with another head, and with adapters that train."""
    torch.manual_seed(0)
    model = cm.bind(torch.export.load(path))
    cm.replace_head(model, "fc", nn.Linear(64, 10))
    cm.lora(model, ("*.conv", "hidden"), r=4, alpha=8, dropout=0.05, modules_to_save="fc")
    return model


def train(model: nn.Module, step: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for epoch in range(epochs):
        model.train()
        frozen = cm.freeze(model, "*.bn")  # after each train(), which wakes the norms
        if not epoch:
            print(frozen)
        for batch in track(torch.randperm(len(x)).split(64), f"epoch {epoch + 1} of {epochs}"):
            optimizer.zero_grad()
            F.cross_entropy(step(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def in_onnxruntime(model: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    """The outputs of the merged and baked program, run by onnxruntime."""
    baked = cm.bake(cm.merge(model), training=False)
    program = torch.export.export(baked, (x[:8],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},))
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help='train through torch.compile(backend="pt2e_modes")')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        published, ours, adapters, onnx = (Path(folder, n) for n in ("a.pt2", "b.pt2", "adapters.pt", "b.onnx"))
        subprocess.run([sys.executable, str(HERE / "somebody_else.py"), str(published)], check=True)
        x, y, x_test, y_test = data()
        model = tuned(published)
        step = torch.compile(model, backend="pt2e_modes") if options.compile else model
        print(f"accuracy before: {accuracy(model, x_test, y_test):.3f}")
        train(model, step, x, y, options.epochs)
        after = accuracy(model, x_test, y_test)
        torch.save(cm.lora_state_dict(model, modules_to_save="fc"), adapters)
        print(f"accuracy after: {after:.3f}; adapters and head: {adapters.stat().st_size / 1024:.0f} KiB")

        cm.save(model, ours)
        expected, loaded = model(x_test).detach(), cm.load(ours)
        from_file = (loaded(x_test) - expected).abs().max().item()
        again = tuned(published).eval()  # the published program and the adapters alone
        cm.load_lora(again, torch.load(adapters, weights_only=True))
        from_adapters = (again(x_test) - expected).abs().max().item()
        in_onnx = (in_onnxruntime(loaded, x_test, onnx) - expected).abs().max().item()
        print(f"largest differences: {from_file:.1e} loaded, {from_adapters:.1e} adapters, {in_onnx:.1e} onnxruntime")
    right = after > 0.9 and from_file == 0 and from_adapters < 1e-5 and in_onnx < 1e-4
    print("ok" if right else "NOT as expected")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
