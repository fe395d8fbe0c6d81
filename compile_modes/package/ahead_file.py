"""The file of a module's code that was compiled ahead: bundles, the kernels of all of them, and what they are for."""

import json
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from compile_modes import messages
from compile_modes._compat import aoti, bundling
from compile_modes.archive.container import HEADER, FileLike, Reader, Writer, reading, writing
from compile_modes.package import weights
from compile_modes.package.ahead import Ahead, Code
from compile_modes.package.loading import fitting
from compile_modes.package.running import Place
from compile_modes.package.signature import Signature

FORMAT = 1  # raised when an older reader would misread a file
KEY = "precompiled"
_FOLDER = "data/precompiled/"
_KERNELS = f"{_FOLDER}kernels/"


def write(path: FileLike, ahead: Ahead, python: Mapping[str, Any]) -> None:
    """Writes code.

    Args:
        path: the file, which appears whole or not at all.
        ahead: the code.
        python: what :meth:`Watch.described` says of the module.

    Raises:
        ArchiveError: it can't be written.
    """
    pool = weights.Pool()
    modes = {mode: _described(code, pool) for mode, code in ahead.codes.items()}
    header = {
        "machine": aoti.machine(ahead.device),
        "modes": modes,
        "tensors": pool.tensors,
        "deciders": ahead.deciders,
        "names": ahead.names,
        "keywords": ahead.keywords,
        "arguments": ahead.arguments,
        "weights": {name: _to_json(of) for name, of in ahead.weights.items()},
        "trained": sorted(ahead.trained),
        "ties": ahead.ties,
        "around": ahead.around,
        "python": python,
    }
    text = json.dumps({"format": FORMAT, "torch": str(torch.__version__), KEY: header})
    with writing(path) as writer:
        pool.write(writer)
        for mode, code in ahead.codes.items():
            _write_code(writer, mode, code)
        for name, data in ahead.kernels.items():
            writer.write(f"{_KERNELS}{name}", data)
        writer.write(HEADER, text.encode())


def _described(code: Code, pool: weights.Pool) -> dict[str, Any]:
    return {
        "flags": code.flags,
        "gradients": code.gradients,
        "signature": code.signature.to_json(),
        "wanted": code.wanted,
        "reads": code.reads,
        "apart": code.apart,
        "constants": {name: pool.add_constant(name, value) for name, value in code.constants.items()},
    }


def _write_code(writer: Writer, mode: str, code: Code) -> None:
    try:
        results = pickle.dumps(code.results)
    except Exception as error:  # whatever a class of the model's raises
        raise messages.RESULTS_NOT_PICKLED.error(error=error) from error
    writer.write(f"{_FOLDER}{mode}.bundle", code.data)
    writer.write(f"{_FOLDER}{mode}.results", results)


def read(path: FileLike) -> tuple[Ahead, dict[str, Any]]:
    """Reads what :func:`write` was given, and opens the code.

    Raises:
        ArchiveError: there is no such file, it is damaged, or another kind of file; or its code is for another torch,
            device or machine.
    """
    with reading(path) as reader:
        said = json.loads(reader.read(HEADER))
        if not isinstance(said.get(KEY), dict):
            raise messages.NOT_PRECOMPILED.error()
        if said["format"] != FORMAT:
            raise messages.NEWER_PACKAGE.error(format=said["format"], torch=said.get("torch"), newest=FORMAT)
        header: dict[str, Any] = {**said[KEY], "torch": said.get("torch")}
        for name in reader.names():
            reader.check(name)
        device = fitting(header)
        tensors = weights.read(reader, header["tensors"], device)
        codes = {mode: _code(reader, mode, one, tensors) for mode, one in header["modes"].items()}
        kernels = {name.removeprefix(_KERNELS): reader.read(name) for name in reader.names(_KERNELS)}
        held = {name: _from_json(of, device) for name, of in header["weights"].items()}
        names, deciders, arguments, around = (header[key] for key in ("names", "deciders", "arguments", "around"))
        trained, ties, functions = set(header["trained"]), header["ties"], opened(codes, kernels)
        keywords = int(header["keywords"])
        ahead = Ahead(
            codes, functions, kernels, deciders, names, keywords, arguments, held, trained, ties, device, around
        )
        return ahead, dict(header["python"])


def _code(reader: Reader, mode: str, one: Mapping[str, Any], tensors: list[torch.Tensor]) -> Code:
    results = pickle.loads(reader.read(f"{_FOLDER}{mode}.results"))
    constants = {name: tensors[index] for name, index in one["constants"].items()}
    signature, data = Signature.from_json(one["signature"]), reader.read(f"{_FOLDER}{mode}.bundle")
    flags, gradients = dict(one["flags"]), bool(one["gradients"])
    return Code(data, flags, gradients, signature, one["wanted"], one["reads"], one["apart"], constants, results)


def opened(codes: Mapping[str, Code], kernels: Mapping[str, bytes]) -> dict[str, Any]:
    """The functions of some modes.

    Raises:
        ArchiveError: torch can't make functions of the bytes.
    """
    bundling.place(kernels)
    found = {}
    for mode, code in codes.items():
        try:
            found[mode] = bundling.opened(code.data)
        except Exception as error:  # torch raises whatever it comes across
            raise messages.CODE_NOT_OPENED.error(mode=mode, error=f"{type(error).__name__}: {error}") from error
    return found


def _to_json(of: Place) -> list[Any]:
    _, shape, stride, dtype, _ = of
    return [list(shape), list(stride), str(dtype).removeprefix("torch.")]


def _from_json(held: list[Any], device: torch.device) -> Place:
    shape, stride, name = held
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a weight of dtype {name}")
    return 0, torch.Size(shape), tuple(stride), dtype, device
