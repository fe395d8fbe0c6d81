"""Loads code in a process of its own, with an empty cache, and compares with eager."""

import copy
import os
import sys
from pathlib import Path

file, folder = Path(sys.argv[1]), Path(sys.argv[2])
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from torch._inductor import compile_fx, cpp_builder  # noqa: E402

import compile_modes as cm  # noqa: E402
from package.precompiled_net import Net, pictures  # noqa: E402


def never(*args, **kwargs):
    raise AssertionError("something was compiled")


compile_fx.compile_fx = cpp_builder.CppBuilder.build = never
model = Net()
model.load_state_dict(torch.load(folder / "weights"))
ours = cm.load_precompiled(file, copy.deepcopy(model))
for step in range(3):
    x = pictures(5 + step, step)
    for module in (ours, model):
        module.train()
        torch.manual_seed(step)
        module(x)["scores"].square().mean().backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in model.parameters()])
    torch.testing.assert_close(list(ours.buffers()), list(model.buffers()))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x)["scores"], model.eval()(x)["scores"])
print("nothing was compiled")
