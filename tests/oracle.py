"""The oracle of all tests: eager PyTorch on the original module, over several flips and steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphs import Body, bodies, sites, state_path

TOLERANCE = 1e-4


def agrees(
    reference: nn.Module,
    module: nn.Module,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[torch.Tensor] = (),
    *,
    oracle: Callable[..., Any] | None = None,
    flips: int = 3,
    steps: int = 3,
    touch: Callable[[nn.Module], Any] = lambda module: None,
    generator: bool = True,
    tolerance: float = TOLERANCE,
) -> None:
    """Trains and evaluates both and asserts equal outputs, gradients, parameters and buffers after every step.

    Args:
        reference: the eager module.
        module: the one under test, whose flags are flipped; ``call`` is what is called (``module`` itself by default).
        inputs: one batch of tensors.
        oracle: what to call for the expected outputs instead of ``reference`` itself.
        flips: rounds of train and eval, of ``steps`` calls each.
        touch: applied to both after each flip, to freeze or wake parts.
        generator: whether training must draw as many random numbers as eager does; evaluation always must.
        tolerance: largest absolute difference; 0.0 demands bit-equality.
    """
    call = module if call is None else call
    oracle = reference if oracle is None else oracle
    optimizers = sgd(reference, module, lr=0.05, momentum=0.9)
    for flip in range(flips):
        for mode in (True, False):
            for m in (reference, module):
                assert m.train(mode) is m
                touch(m)
            for step in range(steps):
                same_step(
                    reference,
                    module,
                    call,
                    inputs,
                    oracle=oracle,
                    optimizers=optimizers if mode else None,
                    seed=100 * flip + step,
                    generator=generator or not mode,
                    tolerance=tolerance,
                )


def same_step(
    reference: nn.Module,
    module: nn.Module,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    *,
    oracle: Callable[..., Any] | None = None,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    seed: int = 0,
    gradients: bool = True,
    generator: bool = True,
    tolerance: float = TOLERANCE,
) -> tuple[Any, Any]:
    """Calls both in the modes that they are in, and asserts equal outputs, gradients, random
    numbers and state; returns the outputs.

    Args:
        optimizers: one for each of the two, if this is a step of training: the squares of the outputs are minimised.
        seed: of the random numbers, the same for both.
        gradients: whether the two have parameters of the same names, to compare gradients by.
        generator: whether both must draw as many random numbers.
    """
    call = module if call is None else call
    oracle = reference if oracle is None else oracle
    outputs, generators = [], []
    for f, optimizer in zip((oracle, call), optimizers or (None, None), strict=True):
        outputs.append(seeded(f, *inputs, seed=seed))
        if optimizer is not None:
            optimizer.zero_grad()
            loss(outputs[-1]).backward()
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and optimizer is None else []
        generators.append(torch.cat([torch.get_rng_state(), *gpus]))
    same("output", *outputs, tolerance)
    if generator:
        same("RNG state", *generators, 0.0)
    if optimizers is not None:
        if gradients:
            same_gradients(reference, module, tolerance)
        for optimizer in optimizers:
            optimizer.step()
    same_state(reference, module, tolerance)
    return outputs[0], outputs[1]


def same_steps(
    reference: nn.Module,
    module: nn.Module,
    call: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    *,
    steps: int = 3,
    train: bool = True,
    **options: Any,
) -> None:
    """Trains both in the modes that they are in, or only calls them: :func:`same_step` several times."""
    optimizers = sgd(reference, module) if train else None
    for seed in range(steps):
        same_step(reference, module, call, inputs, optimizers=optimizers, seed=seed, **options)


def sgd(*modules: nn.Module, **options: Any) -> list[torch.optim.Optimizer]:
    """An optimizer for each module."""
    return [torch.optim.SGD(module.parameters(), **{"lr": 0.05, **options}) for module in modules]


def same_outputs(
    reference: Callable[..., Any],
    call: Callable[..., Any],
    *inputs: Any,
    seeds: int = 3,
    tolerance: float = 0.0,
    **kwargs: Any,
) -> None:
    """Asserts equal outputs from the same seeds, bit for bit unless a tolerance is given."""
    for seed in range(seeds):
        outputs = (seeded(f, *inputs, seed=seed, **kwargs) for f in (reference, call))
        same("output", *outputs, tolerance)


def same_gradients(reference: nn.Module, module: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Asserts that parameters of the same names have equal gradients, or none."""
    ours = dict(module.named_parameters())
    assert ours.keys() == dict(reference.named_parameters()).keys()
    for name, a in reference.named_parameters():
        b = ours[name]
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            same(f"gradient of {name}", a.grad, b.grad, tolerance)


def same_state(reference: nn.Module, module: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Asserts equal ``state_dict``: keys and values, ``num_batches_tracked`` exactly."""
    ours = module.state_dict()
    assert ours.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        same(name, tensor, ours[name], tolerance if tensor.is_floating_point() else 0.0)


def seeded(call: Callable[..., Any], *inputs: Any, seed: int = 0, **kwargs: Any) -> Any:
    """What a call returns whose random numbers begin at a seed."""
    torch.manual_seed(seed)
    return call(*inputs, **kwargs)


def loss(output: Any) -> torch.Tensor:
    """What training minimises: the mean squares of all tensors."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return sum((t.float().square().mean() for t in tensors), torch.zeros(()))


def same(what: str, a: Any, b: Any, tolerance: float) -> None:
    """Asserts that tensors, or all leaves of two structures, are as close as the tolerance says."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")
        return
    (leaves, structure), (others, other_structure) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert structure == other_structure, what
    for i, (x, y) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(x, torch.Tensor):
            same(f"{what}[{i}]", x, y, tolerance)
        else:
            assert x == y, f"{what}[{i}]"


def text(root: nn.Module) -> str:
    """All graphs of a module as text that is the same on every supported torch: values by order, state by its path."""
    return "\n".join(_text(body) for body in bodies(root))


def _text(body: Body) -> str:
    names: dict[fx.Node, str] = {}

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, list | tuple):
            return "(" + ", ".join(show(v) for v in value) + ")"
        return str(value)

    lines, count = [], 0
    for node in body.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            flag = node.op == "get_attr" and str(node.target).endswith("training")
            names[node] = node.target if flag else state_path(body, node) or str(node.target)
        elif node.op == "output":
            lines.append("return " + show(node.args[0]))
        elif node.target != "_guards_fn":  # newer releases check inputs there
            names[node] = f"v{count}"
            count += 1
            operands = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{names[node]} = {_target(node)}({', '.join(operands)})")
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def literals(gm: nn.Module) -> list[dict[str, Any]]:
    """Every argument of every site, by schema name, without the mode and without the nodes."""
    result = []
    for site in sites(gm):
        arguments = site.op.arguments
        values = {name: site.read(name) for name in arguments}
        values = {k: v for k, v in values.items() if not isinstance(v, fx.Node)}
        values.pop(site.op.flag, None)
        if site.op.p is not None:
            values[site.op.p] = site.p
        result.append({"op": str(site.op), **values})
    return result
