"""The program of one mode: exported anew with the flags of that mode, and for training with its backward in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.errors import CompileModesError, few, summary
from compile_modes.exported.provenance import Source, flags, set_flags
from compile_modes.graph.dual import DualModule
from compile_modes.graph.finding import sites
from compile_modes.package.asking import TRAIN, Vector
from compile_modes.package.signature import Signature, signature_of
from compile_modes.package.structure import Node, Strange, Tree, build, describe

_INPUTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT)
_HELD = "module."  # where a Step holds what it calls; no name of a package begins so


@dataclass(frozen=True)
class Examples:
    """What a module is called with: nested, and its tensors.

    Attributes:
        nodes: the arguments, and the targets of a loss, as a package describes them.
        tensors: of both, contiguous.
        count: how many of them are arguments.
        names: of the tensors.
        sizes: what to tell torch.export of their sizes; empty if all are fixed.
        least: the least value of each size, None where nothing is known.
        keywords: the names of the last arguments, which the module is given by name.
    """

    nodes: tuple[Node, Node]
    tensors: list[torch.Tensor]
    count: int
    names: list[str]
    sizes: list[dict[int, Any]]
    least: list[list[int | None]]
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """What a mode is compiled from.

    Attributes:
        exported: the program; its state has the names that it has in the module.
        tensors: examples of its inputs.
        signature: its inputs.
        outputs: the structure of what the module returns.
        tree: the same in torch's own words, with the values that aren't tensors.
        loss: whether the first output is the loss, and the last ones are gradients.
        gradients: the parameters that these are for, in order.
        writes: the buffers that a call writes.
    """

    exported: ExportedProgram
    tensors: list[torch.Tensor]
    signature: Signature
    outputs: Node
    tree: Tree
    loss: bool
    gradients: list[str]
    writes: list[str]


class Seen:
    """What a call has seen, where torch.export, which puts back what a module assigns, doesn't look."""

    outputs: Node
    tree: Tree


class Step(nn.Module):
    """A call of a module whose arguments and results are tensors, and a loss in front of the results."""

    _loss: Callable[..., Any] | None

    def __init__(self, module: nn.Module, examples: Examples, loss: Callable[..., Any] | None, training: bool) -> None:
        super().__init__()
        self.module = module
        self._examples, self._trains = examples, training
        self.__dict__["_loss"] = loss  # no submodule, whose state would be one with the model's
        self.seen = Seen()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, targets = (build(node, tensors) for node in self._examples.nodes)
        count = len(args) - len(self._examples.keywords)
        result = self.module(*args[:count], **dict(zip(self._examples.keywords, args[count:], strict=True)))
        found: list[torch.Tensor] = []
        try:
            self.seen.outputs, self.seen.tree = describe(result, found), Tree.of(result)
        except Strange as why:
            raise messages.STRANGE_OUTPUT.error(what=why) from None
        if not self._trains:
            return tuple(found)
        loss: Any = self._loss(result, *targets) if self._loss is not None else next(iter(found), None)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            said = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise (messages.NO_LOSS if self._loss is None else messages.NO_SCALAR).error(loss=said)
        return (loss, *(tensor.detach() for tensor in found))


def examples_of(
    module: nn.Module,
    args: tuple[Any, ...],
    targets: tuple[Any, ...],
    names: Sequence[str],
    keywords: tuple[str, ...] = (),
) -> Examples:
    """What a bound module is called with; sizes vary where they vary in its own program.

    Args:
        module: the module.
        args: what it is called with, also what it is given by name.
        targets: what a loss is called with.
        names: of ``args``.
        keywords: the last of ``names``, which are given by name.

    Raises:
        PackageError: a value among them is neither a tensor nor a constant, or the program has other inputs.
    """
    tensors: list[torch.Tensor] = []
    try:
        node = describe(tuple(args), tensors)
        count = len(tensors)
        nodes = node, describe(tuple(targets), tensors)
    except Strange as why:
        raise messages.STRANGE_INPUT.error(what=why) from None
    called = _called(args, names) + _called(targets, [f"target{i}" for i in range(len(targets))])
    sizes, least = _sizes(module, tensors[:count])
    varying = any(sizes)
    for target in tensors[count:]:
        sizes.append(dict.fromkeys(range(target.dim()), Dim.AUTO) if varying else {})
        least.append([None] * target.dim())
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    return Examples(nodes, tensors, count, called, sizes if varying else [], least, keywords)


def _called(values: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Names of the tensors in some arguments."""
    found = []
    for name, value in zip(names, values, strict=True):
        held: list[torch.Tensor] = []
        describe(value, held)
        found += [name] if isinstance(value, torch.Tensor) else [f"{name}.{i}" for i in range(len(held))]
    return found


def _sizes(module: nn.Module, tensors: Sequence[torch.Tensor]) -> tuple[list[dict[int, Any]], list[list[int | None]]]:
    """What varies of the sizes of some inputs of a bound module, and between what."""
    root: Any = module.program(True) if isinstance(module, DualModule) else module
    values = [node.meta.get("val") for node in root.graph.find_nodes(op="placeholder")]
    values = [value for value in values if isinstance(value, torch.Tensor)]
    if [value.dim() for value in values] != [tensor.dim() for tensor in tensors]:
        raise messages.OTHER_INPUTS.error(given=len(tensors), wanted=len(values))
    ranges = _ranges(module)
    sizes: list[dict[int, Any]] = []
    least: list[list[int | None]] = []
    for value, tensor in zip(values, tensors, strict=True):
        sizes.append({})
        least.append([None] * tensor.dim())
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_Integer:
                low, high = ranges.get(str(size.node.expr), (None, None))
                sizes[-1][dim], least[-1][dim] = Dim.AUTO(min=low, max=high), low
    return sizes, least


def _ranges(module: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """The ranges of the sizes that vary in a module's own program, by symbol."""
    source = Source.of(module)
    program = source.programs.get("train", source.programs.get("model")) if source is not None else None
    found = {}
    for symbol, bounds in (program.range_constraints if program is not None else {}).items():
        low, high = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
        found[str(symbol)] = (low, high)
    return found


def program_of(
    module: nn.Module, mode: str, vector: Vector, examples: Examples, loss: Callable[..., Any] | None
) -> Program:
    """The program of a mode; that of training computes the loss and the gradients.

    Args:
        module: the bound module; its flags are set, and put back.
        mode: the name of the mode.
        vector: the flags of all submodules in it.
        examples: what the module is called with.
        loss: makes a loss of what the module returns and the targets.

    Raises:
        PackageError: there is no such program.
    """
    if mode != TRAIN:
        return plain_program_of(module, mode, vector, examples, gradients=False)
    step = Step(module, examples, loss, training=True)
    exported, signature = _exported(step, mode, vector, examples, len(examples.tensors), gradients=True)
    return _described(_with_backward(exported, mode), examples.tensors, signature, step.seen, mode, loss=True)


def plain_program_of(module: nn.Module, mode: str, vector: Vector, examples: Examples, *, gradients: bool) -> Program:
    """The program of a mode that computes what the module returns.

    Args:
        module, mode, vector, examples: as for :func:`program_of`.
        gradients: whether gradients are enabled while it runs.

    Raises:
        PackageError: there is no such program.
    """
    step = Step(module, replace(examples, nodes=(examples.nodes[0], {"tuple": []})), None, training=False)
    exported, signature = _exported(step, mode, vector, examples, examples.count, gradients)
    tensors = examples.tensors[: examples.count]
    return _described(exported, tensors, signature, step.seen, mode, loss=False)


def _exported(
    step: Step, mode: str, vector: Vector, examples: Examples, count: int, gradients: bool
) -> tuple[ExportedProgram, Signature]:
    """A call of a module with the flags of a mode, exported with the first ``count`` examples."""
    module, tensors = step.module, examples.tensors[:count]
    before = flags(module)
    try:
        set_flags(module, vector)
        varies = (tuple(examples.sizes[:count]),) if examples.sizes else None
        with torch.enable_grad() if gradients else torch.no_grad():
            exported = torch.export.export(step, tuple(tensors), dynamic_shapes=varies)
        norms = any(site.op.family == "batch_norm" and site.training for site in sites(module))
    except CompileModesError:
        raise
    except Exception as error:  # torch raises whatever it comes across
        raise messages.MODE_FAILS.error(mode=mode, error=summary(error)) from error
    finally:
        set_flags(module, before)
    exported = _renamed(exported, mode)
    # A batch of one value per channel has no variance: what export says of such a size stays.
    least = [[None] * len(one) for one in examples.least] if norms else examples.least
    return exported, signature_of(exported, examples.names[:count], least[:count])


def _with_backward(exported: ExportedProgram, mode: str) -> ExportedProgram:
    try:
        parameters = aoti.reached(exported)
        if parameters:
            return aoti.joint(exported, parameters)
    except Exception as error:  # likewise
        raise messages.MODE_FAILS.error(mode=mode, error=summary(error)) from error
    raise messages.NO_GRADIENT.error()


def _described(
    exported: ExportedProgram, tensors: list[torch.Tensor], signature: Signature, seen: Seen, mode: str, *, loss: bool
) -> Program:
    try:  # in training IR, the signature doesn't say what is written
        specs = (exported if loss else exported.run_decompositions({})).graph_signature.output_specs
    except Exception as error:  # likewise
        raise messages.MODE_FAILS.error(mode=mode, error=summary(error)) from error
    if any(spec.kind is OutputKind.USER_INPUT_MUTATION for spec in specs):
        raise messages.WRITES_INPUTS.error()
    written = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    writes = [str(spec.target) for spec in specs if spec.kind in written]
    gradients = [str(spec.target) for spec in specs if spec.kind is OutputKind.GRADIENT_TO_PARAMETER]
    return Program(exported, tensors, signature, seen.outputs, seen.tree, loss, gradients, writes)


def _renamed(exported: ExportedProgram, mode: str) -> ExportedProgram:
    """A program whose state has the names that it has in the module, not in the Step around that."""
    signature = exported.graph_signature
    strange = [str(spec.kind.name) for spec in signature.input_specs if spec.kind not in _INPUTS]
    if strange:
        raise messages.STRANGE_STATE.error(mode=mode, kinds=few(strange))
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None:
            spec.target = spec.target.removeprefix(_HELD)
    for held in (exported.state_dict, exported.constants):
        for name in list(held):
            held[name.removeprefix(_HELD)] = held.pop(name)
    return exported
