"""What a package says of itself, read without opening its code."""

from typing import Any

from compile_modes.archive.container import FileLike, reading
from compile_modes.console import table
from compile_modes.package.file import read_header
from compile_modes.package.signature import Signature
from compile_modes.package.structure import Node


def inspected(path: FileLike) -> dict[str, Any]:
    """A package as JSON has it: torch, machine, modes, weights and sites. Also of one that can't run here.

    Raises:
        ArchiveError: there is no such file, it is damaged, or no package.
    """
    with reading(path) as reader:
        header = read_header(reader)
        sizes = {name: reader.size(name) for name in reader.names()}
    code = {mode: sum(size for name, size in sizes.items() if f"/{mode}/" in name) for mode in header["modes"]}
    modes = {name: _mode(header, name, mode, code[name]) for name, mode in header["modes"].items()}
    weights = [_weight(header, entry) for entry in header["state"]]
    records = {header["tensors"][entry["tensor"]]["record"] for entry in header["state"]}
    said = {key: header[key] for key in ("torch", "machine", "start", "sites")}
    return {**said, "modes": modes, "weights": weights, "weight_bytes": sum(sizes[record] for record in records)}


def _mode(header: dict[str, Any], name: str, mode: dict[str, Any], code: int) -> dict[str, Any]:
    flags = {owner or "(root)": "train" if mode["flags"][owner] else "eval" for owner in header["deciders"]}
    return {
        "flags": flags,
        "inputs": [str(one) for one in Signature.from_json(mode["signature"]).inputs],
        "ranges": mode["signature"]["ranges"],
        "outputs": ("loss, " if mode["loss"] else "") + _spelled(mode["outputs"]),
        "gradients": mode["gradients"],
        "writes": mode["writes"],
        "constants": sorted(mode["constants"]),
        "code_bytes": code,
    }


def _weight(header: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    tensor = header["tensors"][entry["tensor"]]
    kind = "parameter" if entry["parameter"] else "buffer"
    names = [other["name"] for other in header["state"] if other["tensor"] == entry["tensor"]]
    said = {"kind": kind, "dtype": tensor["dtype"], "shape": tensor["size"], "trained": entry["requires_grad"]}
    return {"name": entry["name"], **said, "tied_to": [name for name in names if name != entry["name"]]}


def _spelled(node: Node) -> str:
    """The structure of an output, a tensor as its number."""
    ((kind, held),) = node.items()
    if kind == "tensor":
        return f"#{held}"
    if kind == "value":
        return repr(held)
    if kind in ("tuple", "list"):
        start, end = "()" if kind == "tuple" else "[]"
        return start + ", ".join(map(_spelled, held)) + end
    if kind == "dict":
        return "{" + ", ".join(f"{key!r}: {_spelled(item)}" for key, item in held) + "}"
    name, keys, items = held
    return f"{name}(" + ", ".join(f"{key}={_spelled(item)}" for key, item in zip(keys, items, strict=True)) + ")"


def as_text(said: dict[str, Any]) -> str:
    """What :func:`inspected` returns, for people."""
    machine = said["machine"]
    where = f"{machine['device']} {machine['capability']}".strip()
    parts = [f"torch {said['torch']}, for {where} on {machine['system']} {machine['machine']}"]
    for name, mode in said["modes"].items():
        lines = [
            f"mode {name}" + (" (starts in it)" if name == said["start"] else "") + f", {mode['code_bytes']:,} bytes"
        ]
        lines.append("  flags: " + ", ".join(f"{owner} {flag}" for owner, flag in mode["flags"].items()))
        lines += [f"  input {one}" for one in mode["inputs"]]
        lines += [f"  {size} from {low} to {high}" for size, (low, high) in mode["ranges"].items()]
        lines.append(f"  returns {mode['outputs']}")
        for title in ("gradients", "writes", "constants"):
            lines += [f"  {title}: {', '.join(mode[title])}"] if mode[title] else []
        parts.append("\n".join(lines))
    rows = []
    for weight in said["weights"]:
        shape = "x".join(map(str, weight["shape"])) or "scalar"
        trained = "" if weight["kind"] == "buffer" else "yes" if weight["trained"] else "no"
        rows.append([weight["name"], weight["kind"], weight["dtype"], shape, trained, ", ".join(weight["tied_to"])])
    title = f"weights, {said['weight_bytes']:,} bytes"
    parts.append(title + "\n" + table(["name", "kind", "dtype", "shape", "trained", "is also"], rows))
    rows = [[s["op"], s["owner"] or "(root)", "by its flag" if s["bound"] else "baked"] for s in said["sites"]]
    if rows:
        parts.append("sites\n" + table(["op", "owner", "mode"], rows))
    return "\n\n".join(parts)
