"""What compiled code takes for granted of a module's Python: classes, attributes, hooks; compared at each call."""

import hashlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from compile_modes import messages

_OWN = vars(nn.Module()).keys()  # what torch itself keeps in every module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BACKWARD = _HOOKS[2:]
_PARTS = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_UNCHANGING = (*_PLAIN, float, type, types.FunctionType, types.BuiltinFunctionType)
_DEPTH = 4  # of containers and objects within each other
Leaf = Callable[[Any], Any]


class Watch:
    """The present state of a module's Python.

    All attributes that there are count, whatever reads them: which of them code depends on is something that only
    running it would tell. Of objects that aren't modules, their own attributes count; of tensors in containers, which
    they are.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.named_modules())
        memo: dict[int, Any] = {}
        self._seen = {name: _state(one, _Same, memo) for name, one in self._modules}
        self._glances = [_Glance(one, self._seen[name]["attributes"]) for name, one in self._modules]

    def check(self) -> None:
        """Compares the module with what it was.

        Raises:
            PackageError: an attribute, a hook, or what a submodule consists of is another one.
        """
        memo: dict[int, Any] = {}  # what several submodules hold is looked at once
        kinds: dict[type, bool] = {}
        for (name, one), glance in zip(self._modules, self._glances, strict=True):
            if glance.finds_no_change(one, memo, kinds):
                continue
            then = self._seen[name]
            now = _state(one, _Same, memo, then["attributes"])
            if now == then:
                continue
            if now["hooks"] != then["hooks"]:
                raise messages.HOOKS_CHANGED.error(name=name or "the root")
            changed = next((key for key in then if key != "attributes" and now[key] != then[key]), "")
            if changed:
                raise messages.MADE_OF_OTHERS.error(what=changed, name=name or "the root")
            old, new = then["attributes"], now["attributes"]
            key = next(key for key in old if key not in new or new[key] != old[key])
            said = f"is {_short(vars(one)[key])}" if key in vars(one) else "is gone"
            raise messages.ATTRIBUTE_CHANGED.error(now=said, then=_said(old[key]), name=f"{name}.{key}".strip("."))

    def backward_hooks(self) -> list[str]:
        """The submodules with hooks on their gradients, which a program can't have."""
        return [name or "the root" for name, one in self._modules if any(getattr(one, hook) for hook in _BACKWARD)]

    def described(self) -> dict[str, dict[str, Any]]:
        """All of it in JSON, to be compared with that of a module in another process."""
        found = {}
        memo: dict[int, Any] = {}
        for name, one in self._modules:
            state = _state(one, _text, memo)
            attributes = {key: _said(value) for key, value in state["attributes"].items() if key != "_code"}
            rest = {key: _said(value) for key, value in state.items() if key not in ("class", "attributes")}
            found[name] = {
                "class": type(one).__qualname__,
                "code": hashlib.sha256("\n".join(_sources(one)).encode()).hexdigest(),
                **rest,
                "attributes": attributes,
            }
        return found


def difference(then: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> str:
    """The first difference between two descriptions; empty if there is none."""
    for name in (*then, *now):
        shown = repr(name) if name else "the root"
        if name not in then or name not in now:
            return f"submodule {shown} is {'new' if name in now else 'gone'}"
        for key in (*then[name], *now[name]):
            old, new = then[name][key], now[name][key]
            if old == new:
                continue
            if key == "class":
                return f"{shown} is a {new}, and was a {old}"
            if key == "attributes":
                which = next(k for k in (*old, *new) if old.get(k) != new.get(k))
                return f"{which} of {shown} is {_short(new.get(which))}, and was {_short(old.get(which))}"
            return f"the {key} of {shown}, a {now[name]['class']}, differ"
    return ""


class _Same:
    """An object that equals itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return _short(self.value)


class _Glance:
    """What tells quickly that a module is as it was: most of what it holds is the very same objects.

    Args:
        module: the module.
        attributes: those that count, in the form that compares.
    """

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        values = vars(module)
        self._kind, self._held = type(module), self._holding(values)
        self._constants = _class_values(module, _Same)
        fixed = {key for key in attributes if isinstance(values[key], _UNCHANGING)}
        self._fixed = [(key, values[key]) for key in fixed]
        self._loose = [(key, frozen) for key, frozen in attributes.items() if key not in fixed]

    @staticmethod
    def _holding(values: dict[str, Any]) -> list[Any]:
        hooks = [_Same(hook) for name in _HOOKS for hook in values[name].values()]
        parts = [[key for key, value in values[name].items() if value is not None] for name in _PARTS]
        return [hooks, _Same(values.get("forward")), parts]

    def finds_no_change(self, module: nn.Module, memo: dict[int, Any], kinds: dict[type, bool]) -> bool:
        """Whether all is as it was for sure. ``memo`` and ``kinds`` are those of one round of comparing."""
        values = vars(module)
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _class_values(module, _Same) == self._constants
        if kind is not self._kind or not kinds[kind] or self._holding(values) != self._held:
            return False
        if any(values.get(key, self) is not value for key, value in self._fixed):
            return False
        return all(key in values and _frozen(values[key], _Same, memo, _DEPTH) == then for key, then in self._loose)


def _state(module: nn.Module, leaf: Leaf, memo: dict[int, Any], known: Any = None) -> dict[str, Any]:
    """What is compared. Of attributes, those that are ``known``, or all: one that is new may be anybody's note."""
    values = vars(module)
    wanted = known if known is not None else [key for key in values if _is_theirs(module, key)]
    attributes = {key: _frozen(values[key], leaf, memo, _DEPTH) for key in wanted if key in values}
    parts = {
        part.strip("_"): [key for key, value in values[part].items() if value is not None and key != "_guards_fn"]
        for part in _PARTS
    }
    hooks = [leaf(hook) for name in _HOOKS for hook in values[name].values()]
    return {
        "class": leaf(type(module)),
        "forward": leaf(values.get("forward")),
        "hooks": hooks,
        **parts,
        "constants of the class": _class_values(module, leaf),
        "attributes": attributes,
    }


def _is_theirs(module: nn.Module, key: str) -> bool:
    """Whether an attribute is more than torch's own bookkeeping. The code of a graph says what it computes."""
    if isinstance(module, fx.GraphModule):
        return key == "_code"
    return key not in _OWN and key != "forward"


def _class_values(module: nn.Module, leaf: Leaf) -> list[Any]:
    """The plain values that classes outside of torch hold."""
    found = []
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] != "torch" and kind is not object:
            found += [
                [key, leaf(value)]
                for key, value in vars(kind).items()
                if isinstance(value, (*_PLAIN, float, tuple, list)) and not key.startswith("__")
            ]
    return found


def _frozen(value: Any, leaf: Leaf, memo: dict[int, Any], depth: int) -> Any:
    """A value in a form that compares by what it holds."""
    if isinstance(value, float):
        return ["float", repr(value)]
    if isinstance(value, _PLAIN):
        return [type(value).__name__, value]
    if isinstance(value, nn.Module | type | types.FunctionType | types.BuiltinFunctionType) or depth == 0:
        return leaf(value)
    if isinstance(value, torch.Tensor):  # those that modules hold themselves are weights
        return ["tensor"] if depth == _DEPTH else leaf(value)
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = type(value).__name__  # while it is looked at: it may hold itself
    parts: Any = leaf(value)
    if isinstance(value, dict):
        parts = [[repr(key), _frozen(one, leaf, memo, depth - 1)] for key, one in value.items()]
    elif isinstance(value, tuple | list):
        parts = [_frozen(one, leaf, memo, depth - 1) for one in value]
    elif isinstance(value, set | frozenset):
        parts = sorted(map(repr, value))
    elif type(value).__module__.partition(".")[0] not in ("builtins", "torch") and isinstance(
        getattr(value, "__dict__", None), dict
    ):
        parts = [[key, _frozen(one, leaf, memo, depth - 1)] for key, one in vars(value).items()]
    memo[id(value)] = [type(value).__name__, parts]
    return memo[id(value)]


def _text(value: Any) -> Any:
    """What another process can compare of an object."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(repr(value.tolist()).encode()).hexdigest()]
    if isinstance(value, (*_PLAIN, float)):
        return repr(value)
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__


def _sources(module: nn.Module) -> Iterator[str]:
    """The code of a module's classes outside of torch, whose release is compared as such; of a graph, what it says."""
    if isinstance(module, fx.GraphModule):
        yield module.code
        return
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] == "torch" or kind is object:
            continue
        try:
            yield inspect.getsource(kind)
        except (OSError, TypeError):  # made by exec(), say
            yield from (_bytecode(one.__code__) for one in vars(kind).values() if isinstance(one, types.FunctionType))


def _bytecode(code: types.CodeType) -> str:
    held = [_bytecode(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {code.co_names} {held}"


def _said(frozen: Any) -> str:
    if isinstance(frozen, list) and len(frozen) == 2 and frozen[0] in ("float", "int", "str", "bool", "NoneType"):
        return str(frozen[1]) if frozen[0] == "float" else repr(frozen[1])
    return _short(frozen, 2000)


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]  # so that what follows counts, too
    return f"{text[: limit - 12]}... {digest}"
