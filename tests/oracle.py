"""The oracle of all tests: eager PyTorch on the original module, over several flips and steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from compile_modes.graph.finding import sites
from compile_modes.graph.view import Body, View

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
        tolerance: largest absolute difference; 0.0 demands bit-equality.
    """
    call = module if call is None else call
    oracle = reference if oracle is None else oracle
    theirs = dict(module.named_parameters())
    assert theirs.keys() == dict(reference.named_parameters()).keys()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (reference, module)]
    for flip in range(flips):
        for mode in (True, False):
            for m in (reference, module):
                assert m.train(mode) is m
                touch(m)
            for step in range(steps):
                seed = 100 * flip + step
                outputs = [_run(f, inputs, seed) for f in (oracle, call)]
                _same("output", *outputs, tolerance)
                _same("RNG state", *_rng_after(oracle, call, inputs, seed), 0.0) if step == 0 and not mode else None
                if mode:
                    for output, optimizer in zip(outputs, optimizers, strict=True):
                        optimizer.zero_grad()
                        _loss(output).backward()
                    for name, a in reference.named_parameters():
                        b = theirs[name]
                        assert (a.grad is None) == (b.grad is None), name
                        if a.grad is not None:
                            _same(f"gradient of {name}", a.grad, b.grad, tolerance)
                    for optimizer in optimizers:
                        optimizer.step()
                same_state(reference, module, tolerance)


def same_outputs(
    reference: Callable[..., Any], call: Callable[..., Any], *inputs: torch.Tensor, seeds: int = 3
) -> None:
    """Asserts bit-equal outputs from the same seeds."""
    for seed in range(seeds):
        _same("output", _run(reference, inputs, seed), _run(call, inputs, seed), 0.0)


def same_state(reference: nn.Module, module: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Asserts equal ``state_dict``: keys and values, ``num_batches_tracked`` exactly."""
    ours = module.state_dict()
    assert ours.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        _same(name, tensor, ours[name], tolerance if tensor.is_floating_point() else 0.0)


def _run(call: Callable[..., Any], inputs: Sequence[torch.Tensor], seed: int) -> Any:
    torch.manual_seed(seed)
    return call(*inputs)


def _rng_after(reference: Any, call: Any, inputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    states = []
    for f in (reference, call):
        _run(f, inputs, seed)
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        states.append(torch.cat([torch.get_rng_state(), *gpus]))
    return states


def _loss(output: Any) -> torch.Tensor:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return sum((t.float().square().mean() for t in tensors), torch.zeros(()))


def _same(what: str, a: Any, b: Any, tolerance: float) -> None:
    if not isinstance(a, torch.Tensor):
        assert type(a) is type(b), what
        for i, (x, y) in enumerate(zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)):
            _same(f"{what}[{i}]", x, y, tolerance)
        return
    torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def text(root: nn.Module) -> str:
    """All graphs of a module as text that is the same on every supported torch: values by order, state by its path."""
    return "\n".join(_text(body) for body in View(root).bodies)


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
            names[node] = node.target if flag else body.view.state[node] or str(node.target)
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
