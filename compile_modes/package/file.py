"""The file of a package: torch's format of AOTInductor packages, a record of ours in JSON, and one in lines for C++."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.archive.container import HEADER, FileLike, Reader, Writer, writing
from compile_modes.package.weights import Pool

FORMAT = 1  # raised when an older reader would misread a file
LINES = "extra/compile_modes.txt"  # the same in lines of words between tabs, for readers that have no JSON
_SUFFIXES = (".so", ".cpp", ".json", ".cubin", ".hsaco", ".spv")  # what a library consists of


def write(path: FileLike, header: Mapping[str, Any], code: Mapping[str, list[str]], pool: Pool) -> None:
    """Writes a package, which appears whole or not at all.

    Args:
        path: the file.
        header: what :func:`read_header` gives back.
        code: the files of each mode's library.
        pool: the weights.

    Raises:
        ArchiveError: it can't be written.
    """
    text = json.dumps({"format": FORMAT, "torch": str(torch.__version__), "package": header}, allow_nan=False)
    with writing(path) as writer:
        pool.write(writer)
        for mode, files in code.items():
            for file in needed(files):
                _write_file(writer, f"{aoti.CODE}{mode}/{os.path.basename(file)}", file)
        writer.write(LINES, "".join("\t".join(line) + "\n" for line in _lines(header)).encode())
        writer.write(HEADER, text.encode())


def needed(files: Iterable[str]) -> list[str]:
    """The files without the sources of kernels, which are in the library."""
    return [
        file
        for file in files
        if file.endswith(_SUFFIXES) and not file.endswith((".kernel.cpp", "kernel_metadata.json"))
    ]


def _write_file(writer: Writer, name: str, file: str) -> None:
    with open(file, "rb") as stream:
        writer.write(name, stream.read())


def read_header(reader: Reader) -> dict[str, Any]:
    """What :func:`write` was given, of a file whose version is known.

    Raises:
        ArchiveError: it is no package, or a newer one.
    """
    held = json.loads(reader.read(HEADER))
    if "precompiled" in held:
        raise messages.IS_PRECOMPILED.error()
    if not isinstance(held.get("package"), dict):
        raise messages.NO_PACKAGE.error()
    if held["format"] != FORMAT:
        raise messages.NEWER_PACKAGE.error(format=held["format"], torch=held.get("torch"), newest=FORMAT)
    header: dict[str, Any] = held["package"]
    for mode in header["modes"]:
        libraries = [name for name in reader.names(f"{aoti.CODE}{mode}/") if name.endswith(".so")]
        if not libraries:  # torch's loader would look for sources, and compile them
            raise ValueError(f"there is no library for mode {mode!r}")
    for name in reader.names():
        reader.check(name)
    return {**header, "torch": held.get("torch")}


def _lines(header: Mapping[str, Any]) -> Iterator[list[str]]:
    """What a program in C++ has to know: weights, and of each mode constants, inputs and outputs, in order."""
    for entry in header["state"]:
        yield ["weight", entry["name"], *_place(header["tensors"][entry["tensor"]])]
    for mode, one in header["modes"].items():
        for name, index in one["constants"].items():
            yield ["constant", mode, name, *_place(header["tensors"][index])]
        for given in one["signature"]["inputs"]:
            yield ["input", mode, given["name"], given["dtype"]]
        for output in output_names(one):
            yield ["output", mode, *output]


def output_names(mode: Mapping[str, Any]) -> Iterator[list[str]]:
    """What a call of a mode's library returns, in order."""
    if mode["loss"]:
        yield ["loss"]
    for index in range(mode["results"]):
        yield ["result", str(index)]
    for name in mode["gradients"]:
        yield ["gradient", name]


def _place(meta: Mapping[str, Any]) -> list[str]:
    numbers = [",".join(map(str, meta[key])) for key in ("size", "stride")]
    return [meta["record"], meta["dtype"], *numbers, str(meta["offset"])]
