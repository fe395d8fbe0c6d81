"""The module that comes in, exported on what the old one got: its graph with flags, and its programs of both modes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from compile_modes import _compat, messages
from compile_modes.errors import CompileModesError, summary
from compile_modes.exported.binding import bind_root
from compile_modes.exported.exporting import export
from compile_modes.exported.provenance import Source
from compile_modes.graph import calls
from compile_modes.graph.finding import find
from compile_modes.graph.view import View


@dataclass
class Donor:
    """An eager module as graphs.

    Attributes:
        bound: its graph with flags.
        train, evaluation: its programs.
        same: whether the eval program says all that the train program says, so that it may stand for both.
    """

    bound: fx.GraphModule
    train: ExportedProgram
    evaluation: ExportedProgram
    same: bool

    @classmethod
    def of(cls, module: nn.Module, values: Sequence[Any], owner: str) -> "Donor":
        """Exports a module in both modes, on tensors like ``values`` (fake ones, whose sizes may be symbols).

        Raises:
            TuningError: it can't be called on them, or is more than one graph.
        """
        examples = tuple(_compat.example_like(value) for value in values)
        shapes = tuple(
            {i: torch.export.Dim.AUTO for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} or None
            for value in values
        )
        said = {"shapes": ", ".join(f"{tuple(v.shape)} of {v.dtype}" for v in values), "kind": type(module).__name__}
        try:
            with torch.no_grad():  # torch.export logs pages of what doesn't fit
                copy.deepcopy(module).eval()(*examples)
            exported = export(module, examples, dynamic_shapes=shapes, progress=False)
        except CompileModesError as error:
            raise messages.HEAD_FAILS.error(**said, owner=owner, error=error.headline) from error
        except Exception as error:  # whatever a module raises
            raise messages.HEAD_FAILS.error(**said, owner=owner, error=summary(error)) from error
        source = Source.of(exported)
        assert source is not None
        if not isinstance(exported, fx.GraphModule) or any(n.target is calls.switch for n in exported.graph.nodes):
            raise messages.HEAD_DECIDES.error(kind=type(module).__name__)
        if len(View(exported).bodies) > 1:
            raise messages.HEAD_HAS_REGIONS.error(kind=type(module).__name__)
        train, evaluation = source.programs["train"], source.programs["eval"]
        if not train.call_spec.out_spec.is_leaf():
            raise messages.HEAD_RETURNS.error(kind=type(module).__name__)
        bindable = bind_root(evaluation, (), None)[1].bindable
        return cls(exported, train, evaluation, len(bindable) == sum(site.bound for site in find(View(exported))))

    def program(self, mode: bool) -> fx.GraphModule:
        """A fresh module of the program of a mode; of train where the eval program has lost something."""
        module: fx.GraphModule = (self.train if mode or not self.same else self.evaluation).module()
        return module
