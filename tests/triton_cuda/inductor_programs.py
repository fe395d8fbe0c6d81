"""What Inductor has written, read: Triton kernels, what they are called with, what they do to the module's state."""

import ast
import importlib.util
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KERNEL = re.compile(
    r"^(\w+) = async_compile\.triton\('\1', '''(.*?)''', device_str='cuda'\)$", re.DOTALL | re.MULTILINE
)
_ALIAS = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*;\s*del \2\b.*$", re.MULTILINE)
_EXTERN = re.compile(r"extern_kernels\.|torch\.ops\.|aten\.")
_RANDOM_KERNEL = re.compile(r"\btl\.rand|\btriton_helpers\.rand")
_RANDOM_EXTERN = re.compile(r"\b(?:rand|randn|randint|bernoulli|native_dropout|rrelu)\w*\b")


class Moved(AssertionError):
    """torch has moved, and what is stood in for, or how its output is read, must follow."""

    def __init__(self, what: str) -> None:
        import torch

        super().__init__(f"{what} (torch {torch.__version__}; see tests/triton_cuda/fake_cuda.py)")


@dataclass(frozen=True)
class Saved:
    """What a forward keeps for its backward."""

    source: str
    """The forward's buffer, or expression."""
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Program:
    """A forward or backward as Inductor wrote it."""

    kernels: Mapping[str, str]
    """Triton sources by name."""
    calls: tuple[tuple[str, tuple[str, ...]], ...]
    """Kernels and their arguments in order; the module's state and the inputs by their own names."""
    externs: tuple[str, ...]
    """Calls of what is not Triton: convolutions, matrix products, and the making of seeds."""
    returns: tuple[str, ...]
    reads: frozenset[str]
    """Inputs that kernels load: state by its name; in a backward, keys of ``saved`` too."""
    writes: frozenset[str]
    """State that kernels store to."""
    saved: Mapping[str, Saved]
    """In a backward: what the forward keeps for it, by the name it has here."""

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn, in a kernel or by a call."""
        return any(draws(source) for source in self.kernels.values()) or any(
            _RANDOM_EXTERN.search(line) for line in self.externs
        )

    @property
    def text(self) -> str:
        """All of it, free of the order of the inputs and of the numbering of buffers."""
        lines = [f"{kernel}({', '.join(arguments)})" for kernel, arguments in self.calls]
        numbers: dict[str, str] = {}
        text = "\n".join([*self.kernels.values(), *lines, *self.externs])
        return re.sub(r"\bbuf\d+\b", lambda m: numbers.setdefault(m[0], f"buf{len(numbers)}"), text)

    def stored_beside(self, state: str) -> set[str]:
        """Whatever is stored by the kernels that store to ``state``."""
        calls = [touched(self.kernels[name], name, arguments, "store") for name, arguments in self.calls]
        return set().union(*(stored for stored in calls if state in stored))


def draws(source: str) -> bool:
    """Whether a kernel draws random numbers."""
    return bool(_RANDOM_KERNEL.search(source))


def parse(
    code: str, names: Mapping[str, str], mutated: Collection[str], saved: Mapping[str, Saved] | None = None
) -> Program:
    """Reads the Python that Inductor wrote.

    Args:
        code: all of it.
        names: what each input of the forward is in the module.
        mutated: the inputs that Inductor says are mutated, to check the reading by.
        saved: in a backward, what the forward has kept for it.
    """
    kernels = dict(_KERNEL.findall(code))
    if len(kernels) != code.count("async_compile.triton("):
        raise Moved(f"not all kernels were read, only {sorted(kernels)}")
    body = code[code.index("\ndef call(" if "\ndef call(" in code else "    def call(") :].partition("\ndef get_args")[
        0
    ]
    aliases = dict(_ALIAS.findall(body))

    def resolve(text: str) -> str:
        return re.sub(r"\b[a-zA-Z_]\w*\b", lambda m: _resolve(m[0], aliases, names), text)

    calls, externs, returns = [], [], ()
    for line in (line.partition("# ")[0].strip() for line in body.splitlines()):
        name, _, rest = line.partition(".run(")
        if name in kernels and rest:
            calls.append((name, tuple(resolve(a) for a in _split(rest.rpartition(")")[0]))))
        elif line.startswith("return "):
            returns = tuple(resolve(a) for a in _split(line.removeprefix("return ").strip("()").rstrip(", ")))
        elif _EXTERN.search(line) and not line.startswith("assert_"):
            externs.append(resolve(line))
    if unused := kernels.keys() - {name for name, _ in calls}:
        raise Moved(f"no call was found of {sorted(unused)}")
    loaded, stored = (
        set().union(*(touched(kernels[name], name, arguments, verb) for name, arguments in calls))
        for verb in ("load", "store")
    )
    writes = frozenset(stored & set(names.values()))
    if writes != (said := {names[m] for m in mutated if m in names}):
        raise Moved(f"kernels seem to write {sorted(writes)}, Inductor says {sorted(said)}")
    reads = frozenset(loaded & {*names.values(), *(saved or {})})
    return Program(kernels, tuple(calls), tuple(externs), returns, reads, writes, saved or {})


def touched(source: str, name: str, arguments: Sequence[str], verb: str) -> set[str]:
    """The arguments of a call that its kernel loads from, or stores to."""
    function = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == name)
    pairs = zip([parameter.arg for parameter in function.args.args], arguments, strict=False)  # no block sizes
    return {a for p, a in pairs if re.search(rf"\btl\.(?:{verb}|atomic_\w+)\({p}\b", source)}


def _resolve(name: str, aliases: Mapping[str, str], names: Mapping[str, str]) -> str:
    while name in aliases and name not in names:
        name = aliases[name]
    return names.get(name, name)


def _split(text: str) -> list[str]:
    """Arguments at the top level of a call."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return [ast.unparse(argument) for argument in call.args]


def ptx(name: str, source: str, directory: Path, capability: int) -> str:
    """Builds one kernel, within ``stand_ins()``, as Inductor would have it built, for another target if need be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path = directory / f"{name}.py"
    path.write_text(source)  # Triton reads the source of its functions from their files
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner: Any = getattr(module, name)
    meta = tuner._create_compile_meta(tuner.configs[0])
    options = tuner._create_compile_options(tuner.configs[0], meta)
    built = triton.compile(
        ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    return str(built.asm["ptx"])
