"""``package``: a model that trains and evaluates, compiled ahead of time, in one file."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes._compat import aoti
from compile_modes.console import progress as progress_bar
from compile_modes.errors import few
from compile_modes.exported.provenance import flags
from compile_modes.files import FileLike, check_place
from compile_modes.graph.finding import sites
from compile_modes.package import file as files
from compile_modes.package.asking import TRAIN, asked, bound_of, deciders, submodules, vectors
from compile_modes.package.losses import check_loss
from compile_modes.package.programs import Program, examples_of, program_of
from compile_modes.package.signature import compiled
from compile_modes.package.structure import tensors_of
from compile_modes.package.weights import Pool, state_of


def package(
    module: nn.Module,
    args: tuple[Any, ...],
    path: FileLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    modes: Sequence[str] | Mapping[str, Any] = ("train", "eval"),
    loss: Callable[..., Any] | None = None,
    targets: tuple[Any, ...] = (),
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Compiles a model ahead of time, in several modes over one set of weights, into one file that needs no Python.

    The mode "train" computes the loss, the results and the gradient of each parameter, and writes the buffers that
    training writes. Any other mode computes the results. :func:`load_package` reads the file, and so does LibTorch's
    ``AOTIModelPackageLoader``, which finds a model of the name of each mode in it.

    Args:
        module: an eager module, of which :func:`export` makes one with both modes; or a bound module. It stays as
            it is.
        args: positional arguments to call it with: tensors, constants that are compiled in, and tuples, lists and dicts
            of these.
        path: the ``.pt2`` file to write. It appears whole or not at all.
        kwargs: arguments by name, the same. The packaged module takes them by name, too.
        modes: "train" and "eval", one or both; or the flags of each mode by its name, as globs of submodules:
            ``{"train": "train", "mc": {"*.drop": "train", "*": "eval"}}``. The first glob that matches decides, ``*``
            last; submodules that none matches are in eval mode.
        loss: called as ``loss(outputs, *targets)``, gives a scalar tensor. Without, the first tensor that the module
            returns is the loss.
        targets: examples of what ``loss`` takes beside the outputs.
        dynamic_shapes: of the arguments, for an eager module, as for ``torch.export.export``. Sizes of ``targets`` vary
            where those of the arguments do. A bound module has the sizes of its program.
        options: Inductor's options.
        progress: whether to show a progress bar on a terminal, if rich is installed.

    Raises:
        PackageError: this torch has no ahead-of-time training, the loss is no scalar, a value has no place in a
            package, or torch can't export or compile a mode.
        OptionError: a mode is none, or two are the same.
        OverrideError: a glob matches no submodule.
        ExportError: the module can't be exported, see :func:`export`.
        ArchiveError: the file can't be written.
    """
    wanted = asked(modes)
    given = _check(options, loss, targets, wanted)
    check_place(path)
    with progress_bar("package", ["export", *(f"compile {mode}" for mode in wanted), "write"], progress) as advance:
        bound, names = bound_of(module, args, kwargs, dynamic_shapes)
        flagged = vectors(bound, wanted)
        named = submodules(bound)
        pool = Pool()
        state = state_of(bound, named, pool)
        device = next((t.device for t in (*bound.parameters(), *bound.buffers())), torch.device("cpu"))
        values, keywords = (*args, *(kwargs or {}).values()), tuple(kwargs or ())
        examples = examples_of(bound, values, targets, names, keywords)
        if loss is not None:
            check_loss(bound, flagged[TRAIN], examples, loss)
        programs = {mode: program_of(bound, mode, vector, examples, loss) for mode, vector in flagged.items()}
        advance()
        code: dict[str, list[str]] = {}
        described: dict[str, Any] = {}
        for mode, program in programs.items():
            code[mode], constants = _compiled(mode, program, given)
            known = {entry["name"] for entry in state}
            held = {name: pool.add_constant(name, value) for name, value in constants.items() if name not in known}
            reads = [name for name in constants if name in known]
            described[mode] = _described(program, flagged[mode], held, reads)
            advance()
        start = next((mode for mode, vector in flagged.items() if _same(bound, vector)), next(iter(flagged)))
        files.write(
            path,
            _header(bound, names, len(keywords), state, pool, described, examples.nodes, start, device),
            code,
            pool,
        )
        advance()


def _check(options: Any, loss: Any, targets: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said before anything is exported; returns the options."""
    if lacking := aoti.missing():
        raise messages.NO_AOT_TRAINING.error(torch=torch.__version__, name=lacking)
    if loss is not None and not callable(loss):
        raise messages.NOT_A_LOSS.error(kind=type(loss).__name__)
    if not isinstance(targets, tuple) or (targets and loss is None) or (loss is not None and TRAIN not in wanted):
        raise messages.TARGETS_WITHOUT_LOSS.error()
    given = dict(options or {})
    if taken := sorted(set(given) & set(aoti.fixed_options())):
        raise messages.FIXED_OPTION.error(names=few(taken))
    return given


def _compiled(mode: str, program: Program, options: dict[str, Any]) -> tuple[list[str], dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch's, about its own code
        return compiled(
            mode,
            program.signature,
            program.exported,
            lambda: aoti.compile_ahead(program.exported, program.tensors, options),
        )


def _described(
    program: Program, vector: dict[str, bool], constants: dict[str, int], reads: list[str]
) -> dict[str, Any]:
    return {
        "flags": vector,
        "signature": program.signature.to_json(),
        "outputs": program.outputs,
        "results": len(list(tensors_of(program.outputs))),
        "loss": program.loss,
        "gradients": program.gradients,
        "writes": program.writes,
        "reads": reads,
        "constants": constants,
    }


def _same(bound: nn.Module, vector: Mapping[str, bool]) -> bool:
    present = flags(bound)
    return all(present.get(name) is mode for name, mode in vector.items())


def _header(
    bound: nn.Module,
    names: list[str],
    keywords: int,
    state: list[dict[str, Any]],
    pool: Pool,
    modes: dict[str, Any],
    nodes: tuple[Any, Any],
    start: str,
    device: torch.device,
) -> dict[str, Any]:
    found = [{"op": s.op.family, "owner": s.owner, "bound": s.bound, "training": s.training} for s in sites(bound)]
    return {
        "machine": aoti.machine(device),
        "modules": submodules(bound),
        "deciders": deciders(bound),
        "state": state,
        "tensors": pool.tensors,
        "args": nodes[0],
        "targets": nodes[1],
        "names": names,
        "keywords": keywords,
        "modes": modes,
        "start": start,
        "sites": found,
    }
