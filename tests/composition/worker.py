"""Run by torchrun, once per process: trains distributed modules beside eager ones, and notes how far they are apart.

``worker.py FILE SCENARIO...`` writes ``{scenario: [what each rank found]}`` to FILE.
"""

import copy
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from torch.nn.parallel import DistributedDataParallel as DDP

import compile_modes as cm
from compile_modes import _compat
from graphs import graphs_compiled

WAIT = timedelta(seconds=60)
FORMS = {
    "eager": lambda m, x: m,
    "bound": lambda m, x: cm.bind(torch.export.export(m, (x,))),
    "unflattened": lambda m, x: cm.bind(torch.export.unflatten(torch.export.export(m, (x,)))),
    "unbound": lambda m, x: torch.export.export(m, (x,)).module(),
}


class Block(nn.Module):
    """Without a convolution in front of the batch norm, so that no gradient is zero but for rounding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width, eps=1e-2, momentum=0.2)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(self.drop(self.bn(x))))


class Net(nn.Module):
    """With a width of 512, the parameters fill three of DDP's smallest buckets, and DDP cuts the graph in three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = Block(width), Block(width), Block(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block3(self.block2(self.block1(x)))


def full(tensor: Any) -> torch.Tensor:
    """The whole tensor, where each process holds a part of it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().double()


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert len(a) == len(b)
    pairs = zip(a.values(), b.values(), strict=True)  # wrappers rename, but keep the order
    return max((full(p) - full(q)).abs().max().item() for p, q in pairs)


def compare(
    reference: nn.Module,
    module: nn.Module,
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    touch: Callable[[nn.Module], Any] = lambda m: None,
    touch_module: Callable[[nn.Module], Any] | None = None,
    reference_call: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Two rounds of training and evaluation of both, flags set on the wrappers; the largest differences.

    With a ``reference_call``, calls run the backward themselves.
    """
    compiled, worst = graphs_compiled(), dict.fromkeys(("output", "gradient", "state"), 0.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (reference, module)]

    def note(what: str, value: float) -> None:
        worst[what] = max(worst[what], value)

    for seed in range(2):
        for mode in (True, False):
            reference.train(mode)
            module.train(mode)
            touch(reference)
            (touch_module or touch)(module)
            for _ in range(2):
                outputs = []
                for f, optimizer in zip((reference_call or reference, call), optimizers, strict=True):
                    torch.manual_seed(seed)
                    optimizer.zero_grad()
                    outputs.append(f(x))
                    if mode:
                        if reference_call is None:
                            outputs[-1].square().mean().backward()
                        optimizer.step()
                note("output", apart({"": outputs[0]}, {"": outputs[1]}))
                if mode:  # after an evaluation, FSDP's parameters are those gathered for it, and have no gradient
                    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (reference, module)]
                    note("gradient", apart(*gradients))
                note("state", apart(reference.state_dict(), module.state_dict()))
    return {**worst, "graphs": graphs_compiled() - compiled}


def ddp(form: str, order: str, *, width: int = 8, **options: Any) -> dict[str, Any]:
    """``order``: what is inside what. An override replaces the flags of the first block's batch norm."""
    base, x = Net(width), inputs(width)
    reference, inner = DDP(copy.deepcopy(base), bucket_cap_mb=1), FORMS[form](base, x)
    if order == "ddp-of-compiled":
        module = call = DDP(compiled(inner, options), bucket_cap_mb=1)
    else:
        module = DDP(inner, bucket_cap_mb=1)
        call = compiled(module, options)
    first = lambda m: getattr(m.module, "_orig_mod", m.module).block1.bn.eval()  # noqa: E731
    return compare(reference, module, call, x, touch=first, touch_module=(lambda m: None) if options else None)


def compiled(module: nn.Module, options: dict[str, Any], backend: str = "pt2e_modes") -> Any:
    return torch.compile(module, backend=backend, options=options or None)


def fsdp(form: str, *, blocks: bool, in_place: bool = False) -> dict[str, Any]:
    base, x = Net(8), inputs(8)
    reference, module = sharded(copy.deepcopy(base), blocks), sharded(FORMS[form](base, x), blocks)
    if in_place:
        module.compile(backend="pt2e_modes")
    call = module if in_place else compiled(module, {})
    return compare(reference, module, call, x, touch=lambda m: m.get_submodule("block2.bn").eval())


def pipelined() -> dict[str, Any]:
    """Two stages, two microbatches, beside eager stages under the same schedule; one norm of the second is frozen.

    Each rank draws its own masks, and has a stage's own outputs, gradients and state to compare.
    """
    base, x, rank = Net(8), inputs(8), dist.get_rank()
    parts = [base.block1], [base.block2, base.block3]
    eager = copy.deepcopy(nn.Sequential(*parts[rank]))
    stage = pipeline(base, (x[:2],), split_spec={"block2": SplitPoint.BEGINNING}).build_stage(rank, x.device)
    cm.bind(stage.submod)
    stage.submod.compile(backend="pt2e_modes")
    stages = PipelineStage(eager, rank, 2, x.device), stage
    run = {module: through(one) for module, one in zip((eager, stage.submod), stages, strict=True)}
    frozen = {eager: "0.bn", stage.submod: "block2.bn"}

    def touch(module: nn.Module) -> None:
        if rank == 1:
            module.get_submodule(frozen[module]).eval()

    return compare(eager, stage.submod, run[stage.submod], x, touch=touch, reference_call=run[eager])


def through(stage: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A call of all stages, which trains if the module of this one is in train: the schedule runs the backward."""
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda output, target: (output - target).square().mean())

    def call(x: torch.Tensor) -> torch.Tensor:
        run = schedule.step if stage.submod.training else schedule.eval
        output = run(x) if dist.get_rank() == 0 else run(target=x)
        return torch.zeros(1) if output is None else output

    return call


def sharded(module: nn.Module, blocks: bool) -> nn.Module:
    for name in ("block1", "block2") if blocks else ():
        fully_shard(module.get_submodule(name))
    return fully_shard(module)


def sharded_blocks_called_once(form: str, backend: str) -> dict[str, Any]:
    x = inputs(8)
    compiled(sharded(FORMS[form](Net(8), x), True), {}, backend)(x)
    return {}


def sync_batch_norm() -> dict[str, Any]:
    """On CPU, eager refuses to train; what counts is that nobody differs."""
    found = {}
    for name, wrap in {
        "eager": lambda m: m,
        "stock": lambda m: compiled(m, {}, "aot_eager"),
        "compile_modes": lambda m: compiled(m, {}),
    }.items():
        torch.manual_seed(0)
        module = nn.SyncBatchNorm.convert_sync_batchnorm(Net(8))
        call, x = wrap(module), inputs(8)
        try:
            outcome = str(call(x).sum().item())
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}".splitlines()[0]
        evaluated = module.eval() and call(x)
        found[name] = [outcome, evaluated.double().sum().item(), int(module.block1.bn.num_batches_tracked)]
        torch._dynamo.reset()
    return found


def inputs(width: int) -> torch.Tensor:
    """Another batch on each rank."""
    return torch.randn(4, width, generator=torch.Generator().manual_seed(dist.get_rank()))


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp-of-compiled bound": lambda: ddp("bound", "ddp-of-compiled"),
    "ddp-of-compiled eager": lambda: ddp("eager", "ddp-of-compiled"),
    "compiled-ddp bound": lambda: ddp("bound", "compiled-ddp"),
    "compiled-ddp eager": lambda: ddp("eager", "compiled-ddp"),
    "compiled-ddp bound in three buckets with an override": lambda: ddp(
        "bound", "compiled-ddp", width=512, overrides={"module.block1.bn": "eval"}
    ),
    "compiled-ddp eager in three buckets with an override": lambda: ddp(
        "eager", "compiled-ddp", width=512, overrides={"module.block1.bn": "eval"}
    ),
    "ddp-of-compiled bound, Inductor": lambda: ddp("bound", "ddp-of-compiled"),
    "fsdp eager, root": lambda: fsdp("eager", blocks=False),
    "fsdp eager, blocks": lambda: fsdp("eager", blocks=True),
    "fsdp eager, blocks, in place": lambda: fsdp("eager", blocks=True, in_place=True),
    "fsdp bound, root": lambda: fsdp("bound", blocks=False),
    "fsdp unflattened, blocks": lambda: fsdp("unflattened", blocks=True),
    "fsdp bound, blocks": lambda: sharded_blocks_called_once("bound", "pt2e_modes"),
    "fsdp unbound, blocks, stock": lambda: sharded_blocks_called_once("unbound", "aot_eager"),
    "pipeline stages bound": pipelined,
    "sync-batch-norm": sync_batch_norm,
}


def main(file: str, *names: str) -> None:
    inductor = _compat.inductor
    dist.init_process_group("gloo", timeout=WAIT)
    found: dict[str, list[Any]] = {}
    for name in names:
        stand_in = lambda mode, options: torch._dynamo.lookup_backend("aot_eager")  # noqa: E731
        _compat.inductor = inductor if name.endswith("Inductor") else stand_in
        torch._inductor.config.fallback_random = True
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            result = SCENARIOS[name]()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        found[name] = [None] * dist.get_world_size()
        dist.all_gather_object(found[name], result)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
