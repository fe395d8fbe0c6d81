"""An eager model, exported in one combination of modes after another."""

import pickle
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from compile_modes import _compat, messages
from compile_modes._compat.data import data_is_traced
from compile_modes._compat.lost_calls import nothing_is_lost
from compile_modes._compat.readers import mode_reads
from compile_modes.console import counter
from compile_modes.errors import ExportError, summary
from compile_modes.exported.assigned import keeping_assignments
from compile_modes.exported.failing import place_of
from compile_modes.exported.faithful import faithful, settled
from compile_modes.exported.provenance import flags, set_flags
from compile_modes.exported.switching.traces import Vector
from compile_modes.graph.cumulative import exportable
from compile_modes.graph.finding import sites
from compile_modes.graph.snapshot import foreign_generators
from compile_modes.logs import logger


class Exporter:
    """Exports of one model; within it, the model is in the modes of the last one, and afterwards as it was.

    Args:
        model: the eager module.
        args, kwargs, dynamic_shapes: as for ``torch.export.export``.
        progress: whether to show on a terminal how many exports it has taken so far.

    Attributes:
        modes: those that the model had, by submodule.
        readers: the modules whose mode it has read in the exports so far.
        read_by_others: those of them whose mode something else reads than their own methods.
        kept: modules that its ``train()`` and ``eval()`` leave in one mode, with that.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        dynamic_shapes: Any,
        *,
        progress: bool = False,
    ) -> None:
        self.model, self.args = model, _traceable(args)
        self.kwargs = _traceable(dict(kwargs)) if kwargs is not None else None
        self.dynamic_shapes, self.progress = dynamic_shapes, progress
        self.modes, self.readers, self.read_by_others = flags(model), set[str](), set[str]()
        self.kept: dict[str, bool] = {}
        self._state, self._resources = _digest(model), ExitStack()
        self._count: Callable[[], None] = lambda: None

    def __enter__(self) -> "Exporter":
        self._count = self._resources.enter_context(counter("exports", show=self.progress, after=0))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._resources.close()
        self.model.train(self.modes[""])  # for models whose train() does more
        set_flags(self.model, self.modes)

    def both(self) -> tuple[ExportedProgram, ExportedProgram]:
        """The programs of train and of eval mode.

        Raises:
            ExportError: as :func:`compile_modes.export` does.
        """
        programs, left = {}, {}
        for training in (False, True):
            self.model.train(training)
            left[training] = flags(self.model)
            programs[training] = self._export(training)
        self.kept = {name: mode for name, mode in left[True].items() if mode is left[False][name]}
        if _digest(self.model) != self._state:
            raise messages.STATE_CHANGES.error(kind=type(self.model).__name__)
        return programs[True], programs[False]

    def probe(self, vector: Vector) -> ExportedProgram:
        """The program of other modes; raises ExportError as well."""
        for name, submodule in self.model.named_modules():
            submodule.training = self.kept.get(name, vector(name))
        return self._export(vector(""))

    def unclear(self, *roots: fx.GraphModule) -> set[str]:
        """The modules of which it isn't known what their mode is read for: not for an op of theirs, or not only.

        Torch's own classes read theirs for what the two programs show.

        Args:
            roots: the modules of programs.
        """
        owners = {site.owner for root in roots for site in sites(root)}
        known = {name for name, m in self.model.named_modules() if type(m).__module__.startswith("torch.nn.")}
        return self.readers - owners - known | self.read_by_others

    def _export(self, training: bool) -> ExportedProgram:
        """The program of the modes that the model is in; ``training`` is the root's."""
        mode, kind = "train" if training else "eval", type(self.model).__name__
        hooks, generators = dict(_compat.BUFFER_HOOKS), list(foreign_generators())
        start = time.perf_counter()
        try:
            with (
                exportable(self.model), faithful(), data_is_traced(_refused), nothing_is_lost(_lost),
                mode_reads(self.model, self.readers, self.read_by_others),
            ):  # fmt: skip
                program = keeping_assignments(self.model, self._run)
        except ExportError:
            raise
        except Exception as error:  # whatever the model, or export on its account, raises
            for leaked in _compat.BUFFER_HOOKS.keys() - hooks.keys():
                del _compat.BUFFER_HOOKS[leaked]
            where = place_of(error, self.model)
            raise messages.EXPORT_FAILED.error(mode=mode, error=summary(error), where=where) from error
        if drawn := _drawn_since(generators):
            raise messages.DRAWN_IN_PYTHON.error(mode=mode, generators=" and ".join(drawn), kind=kind)
        self._count()
        logger.info("export of %s with the root in %s: %.1f s", kind, mode, time.perf_counter() - start)
        return settled(program)

    def _run(self) -> ExportedProgram:
        return torch.export.export(self.model, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes, strict=False)


def _traceable(inputs: Any) -> Any:
    """Arguments with copies of tensors that were made in inference mode."""
    with torch.inference_mode(False):
        return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, inputs)


def _refused(why: str) -> ExportError:
    return messages.ASSIGNED.error(why=why, where="an assignment to .data")


def _lost(what: str) -> ExportError:
    return messages.LOST_CALL.error(what=what)


def _drawn_since(generators: list[tuple[str, Callable[[Any], Any], Any]]) -> list[str]:
    """The generators that have other states now, which are put back."""
    drawn = []
    now = {name: pickle.dumps(state) for name, _, state in foreign_generators()}
    for name, set_state, state in generators:
        if now[name] != pickle.dumps(state):
            set_state(state)
            drawn.append(name)
    return drawn


def _digest(model: nn.Module) -> list[str]:
    """Tells the state of a model from another one, without a copy."""
    digests = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor) or tensor.is_complex():
            continue
        values = tensor.detach().double()
        digests.append(f"{tensor.data_ptr()} {values.sum().item()} {values.abs().sum().item()}")
    return digests
