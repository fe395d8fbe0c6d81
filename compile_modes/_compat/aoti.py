"""AOTInductor: a program with its backward in one graph, compiled into a library, and a library that is called.

Checked on torch 2.14.1 and 2.15.0. The names that are asked for when something is packaged or loaded raise there, not
when this package is imported.
"""

import inspect
import os
import platform
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

CODE = "data/aotinductor/"  # the folder of an archive that torch's loader looks for a model in
WEIGHTS = "data/weights/"

# Weights stay out of the library, and all of them are read when it is called: constants of one dimension and at most 8
# elements are inlined otherwise, and writes to them ignored.
_FIXED: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_cpp_only": False,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # hands them over; nothing is pickled
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}
if torch.__version__ < "2.15":  # which folds a counter that training writes: it stays at 1 (2.14.1)
    _FIXED["joint_graph_constant_folding"] = False
# What of the instructions of a CPU -march=native may use.
_EXTENSIONS = (
    "sse",
    "ssse",
    "avx",
    "amx",
    "fma",
    "f16c",
    "bmi",
    "abm",
    "movbe",
    "vaes",
    "vpclmul",
    "gfni",
    "sha",
    "sve",
)


def missing() -> str:
    """What this torch lacks for packages; empty if nothing."""
    try:
        from torch.export.exported_program import _decompose_exported_program as decompose
    except ImportError:
        return "torch.export.exported_program._decompose_exported_program"
    if "joint_loss_index" not in inspect.signature(decompose).parameters:
        return "joint_loss_index of torch.export.exported_program._decompose_exported_program"
    return "" if _loader() is not None else "torch._C._aoti.AOTIModelPackageLoader"


def fixed_options() -> Iterable[str]:
    """The options of Inductor that packages need as they are."""
    return _FIXED.keys()


def reached(program: ExportedProgram) -> set[str]:
    """The parameters that the first output has a gradient with regard to, found by running the program on fakes."""
    given = program.graph_module.graph.find_nodes(op="placeholder")
    fakes: list[Any] = [node.meta.get("val") for node in given]
    mode = next(fake.fake_mode for fake in fakes if hasattr(fake, "fake_mode"))
    values, leaves = [], {}
    # The dispatcher of Python, as tracers have it: what C++ composes of others (a GRU) fixes the sizes that vary.
    with mode, enable_python_dispatcher(), torch.enable_grad():
        for node, spec in zip(given, program.graph_signature.input_specs, strict=True):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                value = value.detach()
                if spec.kind is InputKind.PARAMETER and program.state_dict[str(spec.target)].requires_grad:
                    leaves[str(spec.target)] = value.requires_grad_()
            values.append(value)
        outputs: Any = fx.Interpreter(program.graph_module).run(*values, enable_io_processing=False)
        if not leaves or not outputs[0].requires_grad:
            return set()
        found = torch.autograd.grad(outputs[0], list(leaves.values()), allow_unused=True)
    return {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def joint(program: ExportedProgram, parameters: set[str]) -> ExportedProgram:
    """A program that computes, after its outputs, the gradients of the first one with regard to ``parameters``.

    Args:
        program: one that nobody else has: it is told that the other parameters need no gradient. torch refuses those
            that get none.
        parameters: some of :func:`reached`.
    """
    from torch._decomp import core_aten_decompositions
    from torch._inductor.decomposition import select_decomp_table
    from torch.export.exported_program import _decompose_exported_program

    given = program.graph_module.graph.find_nodes(op="placeholder")
    for node, spec in zip(given, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.PARAMETER and spec.target not in parameters:
            node.meta["val"] = node.meta["val"].detach()
    # As torch.export.experimental._export_forward_backward does, with what Inductor takes apart for training and no
    # more. That function takes apart attention on a CPU, whose second result is then another one than its backward
    # needs: gradients are wrong without a word (2.15.0).
    trained = select_decomp_table()
    table = {op: function for op, function in core_aten_decompositions().items() if op in trained}
    made: ExportedProgram = _decompose_exported_program(
        program, cia_to_decomp={}, python_decomp_table=table, joint_loss_index=0, decompose_custom_triton_ops=False
    )
    return made


def guards(program: ExportedProgram) -> list[str]:
    """What the inputs of an exported program have to obey beside the ranges of their sizes, in Python's words."""
    return list(program._guards_code)


def compile_ahead(
    program: ExportedProgram, inputs: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Compiles a program into a library.

    Args:
        program: without anything but tensors among its inputs.
        inputs: examples.
        options: Inductor's, beside those that are fixed.

    Returns:
        The files that make a model of a package; and all that the library has to be given before it is called, by name.
    """
    files: list[str] = []
    constants: dict[str, torch.Tensor] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        root: Any = program.module(check_guards=False)
        made: Any = torch._inductor.aot_compile(root, tuple(inputs), options={**options, **_FIXED})
    for item in made:
        if isinstance(item, str):
            files += [item] if item else []
        else:
            constants |= {name: value for name, (value, _) in item.items()}
    return files, constants


class Library:
    """A compiled model of a package.

    Args:
        path: the package.
        name: of the model in it.
        index: of the device that it runs on; -1 for the CPU, and for the present one.
    """

    def __init__(self, path: str, name: str, index: int = -1) -> None:
        kind = _loader()
        self._loader = kind(path, name, False, 1, index)

    def constants(self) -> list[str]:
        """What it has to be given, by name."""
        return list(self._loader.get_constant_fqns())

    def share(self, tensors: dict[str, torch.Tensor]) -> None:
        """Has it read and write these very tensors, which the caller keeps alive. It checks nothing of them."""
        self._loader.load_constants(tensors, False, True, True)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Calls it. It checks nothing of its inputs."""
        return list(self._loader.run(inputs))


def _loader() -> Any:
    return getattr(getattr(torch._C, "_aoti", None), "AOTIModelPackageLoader", None)


def machine(device: torch.device) -> dict[str, Any]:
    """What a library that is compiled here for a device needs to be the same, or at least there, where it runs."""
    said: dict[str, Any] = {
        "system": sys.platform,
        "machine": platform.machine(),
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "device": device.type,
        "extensions": extensions(),
        "capability": "",
    }
    if device.type == "cuda":
        said["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return said


def extensions() -> list[str]:
    """The instructions, beyond those of all of its kind, that this CPU has; where Linux tells."""
    if not os.path.exists("/proc/cpuinfo"):
        return [torch.backends.cpu.get_cpu_capability()]
    with open("/proc/cpuinfo") as stream:
        lines = [line for line in stream if line.startswith(("flags", "Features"))]
    flags = lines[0].partition(":")[2].split() if lines else []
    return sorted(flag for flag in flags if flag.startswith(_EXTENSIONS))
