"""What a compiled mode takes: dtype, sizes and layout of each tensor. Found of a program, and checked at each call.

AOTInductor checks none of it: a tensor with other strides gives a wrong result without a word.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.errors import few, summary
from compile_modes.package.guards import conditions, holds

_T = TypeVar("_T")
# A size: a number; or a symbol, a factor and a summand.
Size = int | list[Any]


@dataclass(frozen=True)
class Input:
    """A tensor that a mode takes; always contiguous. The device is "cpu" or the package's own."""

    name: str
    dtype: str
    device: str
    sizes: list[Size]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(spelled, self.sizes))}]"


def spelled(size: Size) -> str:
    """A size as it is shown: ``8``, ``s0``, ``2*s0 + 1``."""
    if isinstance(size, int):
        return str(size)
    symbol, times, plus = size
    return f"{f'{times}*' if times != 1 else ''}{symbol}{f' + {plus}' if plus else ''}"


@dataclass(frozen=True)
class Signature:
    """The tensors that a mode takes, in order.

    Attributes:
        inputs: what each is.
        ranges: the least and the greatest value of each symbol (None: any).
        conditions: what sizes have to obey beside that, see :mod:`compile_modes.package.guards`.
    """

    inputs: list[Input]
    ranges: dict[str, list[int | None]]
    conditions: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Signature":
        """The reverse of :meth:`to_json`."""
        inputs = [Input(one["name"], one["dtype"], one["device"], list(one["sizes"])) for one in held["inputs"]]
        return cls(inputs, dict(held["ranges"]), list(held["conditions"]))

    def fitted(self, tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """Tensors as they were compiled for: contiguous, and without autograd; raises as :meth:`check` does."""
        self.check(tensors, device)
        return [_plain(tensor) for tensor in tensors]

    def check(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        """Compares tensors with what was compiled for; of their strides, nothing is asked.

        Raises:
            CallError: one has another dtype, device or size.
        """
        symbols: dict[str, int] = {}
        for one, tensor in zip(self.inputs, tensors, strict=True):
            there = device if one.device == device.type else torch.device(one.device)
            if str(tensor.dtype) != f"torch.{one.dtype}" or tensor.device != there or tensor.layout != torch.strided:
                given = f"{tensor.dtype} on {tensor.device}".removeprefix("torch.")
                raise messages.INPUT_KIND.error(name=one.name, given=given, wanted=f"{one.dtype} on {there}")
            if tensor.dim() != len(one.sizes) or not self._fits(one, tensor, symbols):
                raise messages.INPUT_SIZE.error(given=tuple(tensor.shape), wanted=self._wanted(one), name=one.name)
        for condition in self.conditions:
            if not holds(condition, tensors):
                raise messages.CONDITION.error(condition=condition, sizes=few(str(tuple(t.shape)) for t in tensors))

    def told(self, guards: Sequence[str]) -> "Signature":
        """This one with more conditions, in Python's words, of the symbols that sizes are.

        Raises:
            PackageError: no input has one of these symbols as a size.
        """
        places = {
            size[0]: f"size({i}, {dim})"
            for i, one in enumerate(self.inputs)
            for dim, size in enumerate(one.sizes)
            if not isinstance(size, int) and size[1:] == [1, 0]
        }
        found = []
        for guard in guards:
            line = re.sub(r"\b[a-z]+\d+\b", lambda match: places.get(match[0], match[0]), guard)
            try:
                holds(line, [])
            except ValueError as error:
                raise messages.STRANGE_CONDITION.error(condition=error) from None
            found.append(line)
        return replace(self, conditions=[*self.conditions, *found])

    def _fits(self, one: Input, tensor: torch.Tensor, symbols: dict[str, int]) -> bool:
        for size, given in zip(one.sizes, tensor.shape, strict=True):
            if isinstance(size, int):
                if size != given:
                    return False
                continue
            symbol, times, plus = size
            value, rest = divmod(given - plus, times)
            low, high = self.ranges[symbol]
            inside = (low is None or low <= value) and (high is None or value <= high)
            if rest or not inside or symbols.setdefault(symbol, value) != value:
                return False
        return True

    def _wanted(self, one: Input) -> str:
        shown = ", ".join(map(spelled, one.sizes))
        used = [size[0] for size in one.sizes if not isinstance(size, int)]
        bounds = [f"{name} from {low} to {high}" for name in used for low, high in [self.ranges[name]]]
        return f"({shown})" + (f", {', '.join(bounds)}, the same in all inputs" if bounds else "")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Triton's kernels were compiled for tensors that begin at such an address.
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def signature_of(program: ExportedProgram, names: Sequence[str], least: Sequence[Sequence[int | None]]) -> Signature:
    """The signature of an exported program whose inputs are tensors.

    Args:
        program: the program.
        names: what to call its inputs.
        least: the least value of each size of each input that was asked for, None where nothing was. Export says 2
            where it has only taken care that a size isn't 0 or 1.

    Raises:
        PackageError: a size depends on others in a way that isn't linear, or on what no call can be asked for.
    """
    try:
        wanted = conditions(aoti.guards(program))
    except ValueError as error:
        raise messages.STRANGE_CONDITION.error(condition=error) from None
    ranges: dict[str, list[int | None]] = {}
    asked: dict[str, int] = {}
    given = zip(
        program.graph_module.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True
    )
    values = [node.meta["val"] for node, spec in given if spec.kind is InputKind.USER_INPUT]
    found = []
    for name, value, lows in zip(names, values, least, strict=True):
        sizes = [_size(program, name, size, ranges) for size in value.shape]
        found.append(Input(name, str(value.dtype).removeprefix("torch."), value.device.type, sizes))
        for size, low in zip(sizes, lows, strict=True):
            if not isinstance(size, int) and size[1:] == [1, 0] and low is not None:
                asked[size[0]] = max(low, asked.get(size[0], 0))
    for symbol, bounds in ranges.items():
        if bounds[0] == 2 and symbol in asked:
            bounds[0] = asked[symbol]
    return Signature(found, ranges, wanted)


def compiled(mode: str, signature: Signature, program: ExportedProgram, compile_: Callable[[], _T]) -> _T:
    """What a compiler makes of a program.

    Args:
        mode: to name in errors.
        signature: of the program before it is compiled.
        program: the program.
        compile_: compiles it.

    Raises:
        PackageError: it can't be compiled, or torch has fixed a size that was to vary.
    """
    try:
        made = compile_()
        fixed = _specialized(signature, program)
    except Exception as error:  # torch raises whatever it comes across, its compiler too
        raise messages.NOT_COMPILABLE.error(mode=mode, error=summary(error)) from error
    if fixed:
        raise messages.SPECIALIZED.error(mode=mode, inputs=few(fixed))
    return made


def _specialized(signature: Signature, program: ExportedProgram) -> list[str]:
    """The inputs of which torch has fixed a size since that was to vary."""
    nodes, specs = program.graph_module.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs
    values = [n.meta["val"] for n, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]
    found = []
    for one, value in zip(signature.inputs, values, strict=True):
        now = [_size(program, one.name, size, {}) for size in value.shape]
        if now != one.sizes:
            found.append(f"{one} is now [{', '.join(map(spelled, now))}]")
    return found


def _size(program: ExportedProgram, name: str, size: int | torch.SymInt, ranges: dict[str, list[int | None]]) -> Size:
    if isinstance(size, int):
        return size
    expression: Any = size.node.expr
    if expression.is_Integer:
        return int(expression)
    free = list(expression.free_symbols)
    if len(free) == 1:
        (symbol,) = free
        times, plus = expression.coeff(symbol, 1), expression.subs(symbol, 0)
        if times.is_Integer and plus.is_Integer and times > 0 and expression - times * symbol - plus == 0:
            bounds = program.range_constraints.get(symbol)
            low, high = (bounds.lower, bounds.upper) if bounds is not None else (expression * 0, expression)
            ranges[str(symbol)] = [_number(low), _number(high)]
            return [str(symbol), int(times), int(plus)]
    raise messages.STRANGE_SIZE.error(size=expression, name=name)


def _number(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer else None
