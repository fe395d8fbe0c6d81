"""AOTAutograd's functions as bytes: a graph compiled with its backward, and opened again where the model is.

Checked on torch 2.14.1 and 2.15.0. ``torch._inductor.standalone_compile(aot=True)`` makes them, as
``OptimizedModule._aot_compile`` does. On a CPU, the bytes hold the sources of kernels in C++, which are
compiled when they are opened, unless Inductor's cache has them: the files that it keeps there belong to the bytes.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.export import ExportedProgram

_replacing = threading.RLock()  # a function of a module is everybody's
_FUNCTORCH = {"strict_autograd_cache": True, "bypass_autograd_cache_key": True, "force_autograd_cache": True}
# Of a CPU: libraries, and notes that this machine can run them.
_KERNEL = re.compile(r"[a-z0-9]{2}/[\w.-]+\.(so|o|load_ok)")
# The fake of a convolution asks for the batch to choose among kernels, and so among layouts of its result, which
# compiled code compares at each call.
_CHECKED_ANYWAY = (("fake_impls.py", "conv"),)


def missing() -> str:
    """What this torch lacks; empty if nothing."""
    try:
        from torch._inductor.standalone_compile import AOTCompiledArtifact
    except ImportError:
        return "torch._inductor.standalone_compile.AOTCompiledArtifact"
    lacking = [name for name in _FUNCTORCH if not hasattr(torch._functorch.config, name)]
    if lacking:
        return f"torch._functorch.config.{lacking[0]}"
    return "" if hasattr(AOTCompiledArtifact, "deserialize") else "AOTCompiledArtifact.deserialize"


@contextlib.contextmanager
def own_cache() -> Iterator[Callable[[], dict[str, bytes]]]:
    """Has Inductor keep its files apart, and gives a function that reads those that code needs, by name."""
    from torch._inductor.utils import fresh_cache

    failed = None
    with fresh_cache():
        try:
            _check_instructions()
            yield _kernels
        except BaseException as error:
            failed = error  # raised behind the block, which would leave its folder there
    if failed is not None:
        raise failed


def bundled(program: ExportedProgram, gradients: bool, options: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """Compiles the graph of a program, its parameters among its inputs.

    Args:
        program: one that nobody else has, with :func:`set_leaves`.
        gradients: whether there is a backward.
        options: Inductor's.

    Returns:
        The function, pickled: opening it runs what it says. And what sizes have to obey, in Python's words, by the
        symbols of the program.
    """
    module = program.graph_module
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    fakes = [value for value in values if isinstance(value, torch.Tensor)]
    shapes: Any = getattr(getattr(fakes[0], "fake_mode", None), "shape_env", None) if fakes else None
    before = len(shapes.guards) if shapes is not None else 0
    given = {"config_patches": dict(options)} if options else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        stack.enter_context(torch._functorch.config.patch(_FUNCTORCH))
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        made: Any = torch._inductor.standalone_compile(
            module, values, dynamic_shapes="from_graph", options=given, aot=True
        )
        return made.serialize(), _guards(shapes, before)


def set_leaves(module: fx.GraphModule, wanted: Sequence[bool]) -> None:
    """Makes fakes of a graph's inputs leaves of autograd; they stand in the graph, which is where Inductor looks.

    Args:
        module: the graph.
        wanted: of each input, whether it gets a gradient.
    """
    for node, asked in zip(module.graph.find_nodes(op="placeholder"), wanted, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.meta["val"] = value.detach().requires_grad_(asked)
    for node in module.graph.output_node().all_input_nodes:
        node.meta.setdefault("example_value", node.meta.get("val"))  # where torch 2.13 looks


def _guards(shapes: Any, before: int) -> list[str]:
    from torch.utils._sympy.printers import PythonPrinter

    found = []
    for guard in shapes.guards[before:] if shapes is not None else ():
        frame = guard.sloc.framework_loc
        where = (os.path.basename(getattr(frame, "filename", "")), getattr(frame, "name", ""))
        if where not in _CHECKED_ANYWAY:
            found.append(PythonPrinter().doprint(guard.expr))
    return found


def _check_instructions() -> None:
    """Has Inductor leave notes in its cache of what this machine can run: it looks once in a process, wherever."""
    from torch._inductor import cpu_vec_isa

    known_isas: list[Any] = cpu_vec_isa.valid_vec_isa_list()
    for isa in known_isas:
        for kind in type(isa).__mro__:
            for name in ("__bool__", "_VecISA__bool__impl"):
                known: Any = getattr(vars(kind).get(name), "cache_clear", None)
                if known is not None:
                    known()
        bool(dataclasses.replace(isa))  # one that was looked at asks for other flags


def _kernels() -> dict[str, bytes]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = {}
    root = cache_dir()
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            if _KERNEL.fullmatch(name):
                with open(path, "rb") as stream:
                    found[name] = stream.read()
    return found


def place(kernels: Mapping[str, bytes]) -> None:
    """Puts files into Inductor's cache, where they aren't there.

    Raises:
        ValueError: one has a strange name.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name, data in kernels.items():
        if not _KERNEL.fullmatch(name):
            raise ValueError(f"a kernel has the name {name!r}")
        _place(os.path.join(cache_dir(), name), data)


def opened(data: bytes) -> Callable[..., Sequence[Any]]:
    """The function that some bytes are. It takes what the graph takes, one by one, and checks little of it."""
    from torch._inductor import codecache
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    # Headers would be compiled ahead of the kernels, also where no kernel is to be. The option for that has a part in
    # the names of kernels, and stays.
    with (
        warnings.catch_warnings(),
        _replacing,
        mock.patch.object(codecache, "_precompile_header", create=True, return_value=None),
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        return AOTCompiledArtifact.deserialize(data)


def _place(path: str, data: bytes) -> None:
    """Writes a file that isn't there, so that others see it whole or not at all."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(8)}"
    with open(temporary, "xb") as stream:
        stream.write(data)
    os.replace(temporary, path)
