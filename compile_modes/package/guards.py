"""What a model's code asked of sizes, beyond ranges: conditions of what was compiled, checked at each call."""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SIZE = re.compile(r"L\['\w+'\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def conditions(code: Sequence[str]) -> list[str]:
    """Conditions of torch.export on the inputs of a Step, in terms of ``size(input, dimension)``.

    Raises:
        ValueError: one is about something else than whole numbers and sizes; the argument is that one.
    """
    found = [_SIZE.sub(lambda m: f"size({m[1] or 0}, {m[2]})", line) for line in code]
    for line in found:
        holds(line, [])
    return found


def holds(condition: str, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether some tensors obey a condition of :func:`conditions`; with no tensors, it is only read.

    Nothing is run: a file that says something else is refused.

    Raises:
        ValueError: it isn't such a condition.
    """

    def size(index: int, dimension: int) -> int:
        return tensors[index].shape[dimension] if tensors else 2

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int()):
                return node.value
            case ast.Call(func=ast.Name(id="size"), args=[ast.Constant(), ast.Constant()], keywords=[]):
                return size(node.args[0].value, node.args[1].value)  # type: ignore[attr-defined]
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.operand))
            case ast.BoolOp():
                values = [value(part) for part in node.values]
                return all(values) if isinstance(node.op, ast.And) else any(values)
            case ast.Compare(ops=[one], comparators=[right]) if type(one) in _OPERATORS:
                return _OPERATORS[type(one)](value(node.left), value(right))
        raise ValueError(condition)

    try:
        tree = ast.parse(condition, mode="eval").body
        return bool(value(tree))
    except (SyntaxError, IndexError) as error:
        raise ValueError(condition) from error
    except ZeroDivisionError:
        return False
