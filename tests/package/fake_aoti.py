"""A stand-in for AOTInductor: "libraries" that run their exported program in Python, so that tests need no compiler."""

import secrets
import zipfile

from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

PROGRAMS = {}  # by what is written into the file of a library


def compile_ahead(folder):
    """What replaces ``_compat.aoti.compile_ahead``; files are written into a folder."""

    def compiled(program, inputs, options):
        key = secrets.token_hex(8)
        PROGRAMS[key] = program
        for name in (f"{key}.wrapper.so", f"{key}.wrapper.cpp", f"{key}.wrapper_metadata.json"):
            (folder / name).write_text(key)
        used = {str(spec.target) for spec in program.graph_signature.input_specs if spec.target is not None}
        held = {**program.state_dict, **program.constants}
        return [str(path) for path in folder.glob(f"{key}*")], {name: held[name] for name in used}

    return compiled


class Library:
    """What replaces ``_compat.aoti.Library``."""

    shared = 0  # how often tensors were handed over

    def __init__(self, path, name, index=-1):
        with zipfile.ZipFile(path) as archive:
            (library,) = [n for n in archive.namelist() if f"/{name}/" in n and n.endswith(".so")]
            self.program = PROGRAMS[archive.read(library).decode()]
        self.held = None

    def constants(self):
        return [str(spec.target) for spec in self.program.graph_signature.input_specs if spec.target is not None]

    def share(self, tensors):
        self.held = tensors
        Library.shared += 1

    def run(self, inputs):
        inputs = iter(inputs)
        specs = self.program.graph_signature.input_specs
        given = [next(inputs) if spec.kind is InputKind.USER_INPUT else self.held[str(spec.target)] for spec in specs]
        outputs = fx.Interpreter(self.program.graph_module).run(*given, enable_io_processing=False)
        returned = []
        for spec, value in zip(self.program.graph_signature.output_specs, outputs, strict=True):
            if spec.kind is OutputKind.BUFFER_MUTATION:
                self.held[str(spec.target)].copy_(value)
            else:
                returned.append(value)
        return returned
