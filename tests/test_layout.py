"""The house rules that a machine can check."""

import ast
import graphlib
from pathlib import Path

import compile_modes

PACKAGE = Path(compile_modes.__file__).parent
# Each folder imports only from those on floors below its own; files on the top level are the base, or the face.
BASE = {"errors", "messages", "console", "files", "logs", "pages"}
FLOORS = [
    {"_compat"},
    BASE,
    {"graph"},
    {"archive", "forms"},
    {"exported", "backend"},
    {"warming", "package", "tuning", "sampling"},
    {"integrations"},
    {"cli", "__init__"},
    {"__main__"},
]


def modules():
    """Each file of the package, with its room: the folder that it is in, or its own name on the top level."""
    for path in PACKAGE.rglob("*.py"):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """The rooms that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "compile_modes":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("compile_modes."):
            yield node.module.split(".")[1]


def test_imports_between_folders_point_one_way():
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    assert {room for _, room in modules()} == floors.keys()
    for path, room in modules():
        for imported in imports(path):
            name = path.relative_to(PACKAGE)
            same = imported == room or {imported, room} <= BASE
            assert same or floors[imported] < floors[room], f"{name} imports {imported}"


def test_imports_between_files_make_no_circle():
    paths = {dotted(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        named = [(node.module, f"{node.module}.{alias.name}") for node in found for alias in node.names]
        graph[name] = {file if file in paths else module for module, file in named} & paths.keys()
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def dotted(path):
    """The name that a file is imported by."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_files_and_functions_are_short():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 300, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 45, f"{path.name}:{node.name} has {length} lines"


def test_private_torch_names_stay_in_one_folder():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "_compat":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                private = [n for n in names if n.startswith("torch.") and any(p.startswith("_") for p in n.split("."))]
                assert not [n for n in private if n not in ("torch._ops",)], f"{path.name} imports {private}"
