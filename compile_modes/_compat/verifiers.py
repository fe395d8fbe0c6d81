"""What torch.export's programs are checked by, and what their constructor can't be told."""

import copy
from typing import Any

from torch._export.verifier import SpecViolationError as SpecViolationError
from torch._export.verifier import TrainingIRVerifier as TrainingIRVerifier
from torch.export import ExportedProgram


def with_state(program: ExportedProgram, state: dict[str, Any], constants: dict[str, Any]) -> ExportedProgram:
    """A program with the same graph around other values."""
    program = copy.copy(program)
    program._state_dict, program._constants = state, constants
    return program


def keep_guards(program: ExportedProgram, source: ExportedProgram) -> None:
    """Gives a program the checks of its inputs that another one has; of a program from a file, no shape tells them."""
    if hasattr(source, "_guards_code"):
        program._guards_code = list(source._guards_code)
