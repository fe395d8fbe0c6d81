"""``python worker.py PACKAGE BATCHES OUT``: trains and evaluates a package in a process that has no code of its model.

Nothing can be compiled here, and nothing is: there is no compiler on the path, Python says when a program is started or
a class is unpickled, and torch's counters are looked at.
"""

import os
import sys
import time

import torch
from torch._dynamo.utils import counters

import compile_modes as cm

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}


def run(path, batches, optimizer):
    """Losses of all steps, the outputs of each tenth evaluation, and the state at the end."""
    started = time.perf_counter()
    module = cm.load_package(path)
    loaded = time.perf_counter()
    module.eval()(*batches[0][0])
    called = time.perf_counter()
    stepper = OPTIMIZERS[optimizer](module.train().parameters())
    losses, evaluated = [], []
    for step, (args, targets) in enumerate(batches):
        stepper.zero_grad()
        loss, _ = module(*args, *targets)
        loss.backward()
        stepper.step()
        losses.append(loss.detach())
        if step % 10 == 9:
            evaluated.append(module.eval()(*args)["logits"])
            module.train()
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    times = torch.tensor([loaded - started, called - loaded])
    return {"losses": torch.stack(losses), "evaluated": evaluated, "state": state, "times": times}


def refuse(event, args):
    """Ends the process if it starts another one, or unpickles something."""
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system", "pickle.find_class"):
        os.write(2, f"{event} {args}".encode())
        os._exit(9)


if __name__ == "__main__":
    path, batches, out = sys.argv[1:]
    os.environ["PATH"] = os.environ["CXX"] = "/nonexistent"
    batches = torch.load(batches, weights_only=True)
    sys.addaudithook(refuse)
    torch.save({name: run(path, batches, name) for name in OPTIMIZERS}, out)
    assert not counters["inductor"], counters
    assert not counters["frames"], counters
