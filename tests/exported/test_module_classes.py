"""Every module class of torch whose behaviour depends on mode: found by a scan, bound, and compared with eager."""

import ast
import copy
import importlib
import inspect
import pkgutil
import re
import textwrap
import warnings
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType

import pytest
import torch
from torch import nn

import compile_modes as cm
from cases import FROZEN, SPECTRAL_NORM_HOOK, SWITCHES, Wrapped, cases, vision
from oracle import agrees, same_outputs

TABLE = {case.name: case for case in cases()}

# What bind gets wrong without a word, and nobody is at.
WRONG = {
    ("BatchNorm-tracking-turned-off", "eval"): "in train it would not move its running statistics",
    ("qat.ConvBn2d-slow", "train"): "half of it switches: the branch on bn.training stays, its batch norm moves",
}

# Methods that make one module from another; to copy ``training`` is not to depend on it.
CONVERSIONS = ("to_float", "from_float")

PACKAGES = ("torch.nn", "torch.ao.nn", "torchvision.ops")

# Classes that need no case, by qualified name or its beginning.
EXCLUDED = {
    "torch.ao.nn.quantized.": "inference only: made by convert()",
    "torch.ao.nn.intrinsic.quantized.": "inference only: made by convert()",
    "torch.ao.nn.sparse.quantized.": "inference only: made by convert()",
    "torch.ao.nn.intrinsic.qat.modules.conv_fused._ConvBnNd": "abstract",
    "torch.nn.modules.batchnorm._BatchNorm": "abstract",
    "torch.nn.modules.instancenorm._InstanceNorm": "abstract",
    "torch.nn.parallel.": "wraps a module that is exported without it",
    "torchvision.ops.misc.ConvNormActivation": "abstract",
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": "has a batch norm only if it is given one",
}


def classes() -> Iterator[type]:
    """All classes defined in the packages, private and nested modules included."""
    for name in PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError:  # torchvision is optional
            continue
        modules = [package]
        for info in pkgutil.walk_packages(package.__path__, name + "."):
            modules.append(_imported(info.name))
        for module in filter(None, modules):
            yield from (o for o in vars(module).values() if isinstance(o, type) and o.__module__ == module.__name__)


def _imported(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated homes of modules
            return importlib.import_module(name)
    except ImportError:  # needs a library that is not installed
        return None


@cache
def _tree(function: object) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, IndentationError, SyntaxError):  # written in C++, or generated
        return None


def _functions(cls: type) -> Iterator[tuple[FunctionType, ast.AST]]:
    """The methods of a class, inherited ones included but those of nn.Module, without conversions to other classes."""
    for base in cls.__mro__:
        if base in (object, nn.Module) or not base.__module__.startswith(("torch", "torchvision")):
            continue
        for name, member in vars(base).items():
            if isinstance(member, FunctionType) and name not in CONVERSIONS and (tree := _tree(member)) is not None:
                yield member, tree


def depends_on_mode(cls: type) -> bool:
    """Whether a method reads an attribute named ``training``, or the class has a ``train`` or ``eval`` of its own."""
    return any(
        (function.__name__ in ("train", "eval") and issubclass(cls, nn.Module))
        or any(_reads_training(node) for node in ast.walk(tree))
        for function, tree in _functions(cls)
    )


def _reads_training(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Load)


def mentions(cls: type, found: set[type]) -> bool:
    """Whether the constructor of a module class mentions one of these classes, to make or to be given one."""
    return issubclass(cls, nn.Module) and any(
        isinstance(value := _value(function, node), type) and value in found
        for function, tree in _functions(cls)
        if function.__name__ == "__init__"
        for node in ast.walk(tree)
    )


def _value(function: FunctionType, node: ast.AST) -> object:
    """What a global name, or an attribute of one, stands for in a function; None if that isn't known."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id)
    return getattr(_value(function, node.value), node.attr, None) if isinstance(node, ast.Attribute) else None


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def scanned() -> set[type]:
    everything = set(classes())
    found = {cls for cls in everything if depends_on_mode(cls)}
    while more := {cls for cls in everything - found if mentions(cls, found)}:
        found |= more
    return found


def test_every_class_that_depends_on_mode_has_a_case_or_a_reason():
    found = scanned()
    covered = {cls for case in TABLE.values() for cls in (type(case.build()), *case.covers)}
    missing = sorted(
        name for name in map(qualified, found - covered) if not any(name.startswith(prefix) for prefix in EXCLUDED)
    )
    assert not missing, f"give these a case in tests/cases.py, or a reason in EXCLUDED: {missing}"


def test_the_scan_sees_what_it_should():
    found = scanned()
    by_read, by_child, hook = nn.RReLU, nn.TransformerDecoderLayer, SPECTRAL_NORM_HOOK
    assert {by_read, nn.SyncBatchNorm, nn.LazyInstanceNorm1d, by_child, nn.Transformer, hook} <= found
    assert not found & {nn.Module, nn.Linear, nn.GroupNorm, nn.FractionalMaxPool2d, nn.Sequential}


def test_every_exclusion_excludes_something():
    names = {qualified(cls) for cls in scanned()}
    for prefix in EXCLUDED:
        if not prefix.startswith("torchvision") or vision is not None:
            assert any(name.startswith(prefix) for name in names), prefix


def parameter(name: str, mode: str) -> object:
    reason = WRONG.get((name, mode))
    marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
    return pytest.param(name, mode, marks=marks, id=f"{name}-{mode}")


@pytest.mark.parametrize(("name", "mode"), [parameter(name, mode) for name in TABLE for mode in ("train", "eval")])
@pytest.mark.every(6)
def test_bound_it_does_what_eager_does_or_says_why_not(name, mode):
    case = TABLE[name]
    expected = case.train if mode == "train" else case.eval
    reference = perturbed(Wrapped(case.build()))
    x = tuple(torch.randn(shape) for shape in case.shapes)
    module = copy.deepcopy(reference).train(mode == "train")
    with case.around(module):
        program = torch.export.export(module, x, strict=case.strict)
    if expected not in (SWITCHES, FROZEN):
        with pytest.warns(cm.ModeWarning, match=expected):
            bound = cm.bind(program)
        assert re.search(expected, cm.explain(bound))
        with case.around(reference):
            same_outputs(reference.train(mode == "train"), bound, *x)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CM234")  # eval exports can't tell what it keeps in eval
        warnings.filterwarnings("ignore", ".*exported in eval mode have several users")  # none of these is wrong
        warnings.filterwarnings("ignore", "CM237: 'module.attention.dequant_k'")  # only quantized does it more
        bound = cm.bind(program)
    if expected == SWITCHES:
        agrees(reference, bound, inputs=x, flips=2, steps=1, tolerance=case.tolerance)
        return
    reference.train(mode == "train")
    for flag in (True, False):
        same_outputs(reference, bound.train(flag), *x)


def perturbed(module: nn.Module) -> nn.Module:
    """Weights that no layer starts with: some starts, such as zeros, hide what a mode changes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def test_the_lists_of_failures_name_cases():
    assert {name for name, _ in WRONG} <= set(TABLE)
