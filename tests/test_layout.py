"""The house rules that a machine can check."""

import ast
from pathlib import Path

import compile_modes

PACKAGE = Path(compile_modes.__file__).parent
# Each file imports only from files to its left.
ORDER = [
    "_compat", "_compat.cache", "_compat.archives", "_compat.frames", "_compat.kept", "_compat.tracing",
    "_compat.passes", "_compat.verifiers", "errors", "console", "snapshot", "dual", "container", "storages",
    "loader", "archive", "counters", "gates", "cumulative", "ops", "calls", "bodies", "source", "sizes",
    "regions", "folding", "flags", "sites", "listing", "rewrite", "literals", "recompose", "remarks", "planning",
    "binding", "baking", "pairing", "exporting", "vectors", "saving", "retrace", "capture", "sharing",
    "lifting", "spelling", "programs", "opening", "printing", "owners", "forced", "logs", "forms",
    "forms.recurrent", "forms.saved", "staging", "passes", "reach",
    "backend", "exported", "warmup", "demo", "__init__",
    "commands", "__main__",
]  # fmt: skip


def modules():
    """Each file of the package with its name in ORDER."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


def test_imports_point_one_way():
    assert sorted(ORDER) == sorted(name for _, name in modules())
    for path, name in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("compile_modes."):
                imported = module.removeprefix("compile_modes.")
                assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {module}"


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
