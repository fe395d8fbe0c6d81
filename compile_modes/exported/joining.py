"""``bind``: one program, or the two that someone has exported already, with modes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from compile_modes import messages
from compile_modes._compat import pt2
from compile_modes.exported import binding
from compile_modes.exported.assembling import assemble, say_guessed
from compile_modes.graph.finding import sites


def bind(
    exported: Any,
    *,
    keep: Sequence[str] = (),
    dropout_p: Mapping[str, float] | None = None,
    evaluation: ExportedProgram | None = None,
) -> Any:
    """Gives an exported program working ``train()`` and ``eval()``, submodule by submodule.

    Each mode-dependent site reads its owner's ``training`` afterwards, so eager calls follow it and Dynamo guards on
    it: under ``torch.compile``, each combination of modes in use compiles once. Binding alone changes no behaviour:
    each owner's flag starts as the mode that its sites were exported in. Sites of one owner that disagree with its
    majority (``training=True`` written into the model) keep their literal; :func:`explain` lists them.

    With ``evaluation``, the two exports of a model say more: which literals follow a flag, and what Python decides by
    ``training``. Where they differ in more than flags, the module that owns what differs is taken for the one that
    decides, for nothing but the model could tell; that is warned of.

    Args:
        exported: an ExportedProgram, the GraphModule of ``ep.module()``, a PT2E-prepared GraphModule, an
            UnflattenedModule, or an OptimizedModule around one of these. Modules are bound in place; parameters,
            buffers and ``state_dict`` keys stay as they are. With ``evaluation``, the program of train mode.
        keep: globs of owners whose sites keep their literal, also when the module is bound again, and of modules that
            need no mode.
        dropout_p: attention dropout that an eval export has lost, ``{owner glob: probability}``; first match wins.
        evaluation: the program of eval mode, with the same weights, which it shares from then on.

    Returns:
        The bound module: ``exported`` itself, or the new module of an ExportedProgram.

    Raises:
        BindError: there is no graph, or an owner's name is taken by another attribute; or two programs differ in
            weights: it is said in which; or they are the wrong way round.
        OptionError: ``keep`` or ``dropout_p`` are not usable, or the site has kept its probability.
        OverrideError: a pattern matches no site.

    Warns:
        ModeWarning: some sites can't follow the flag, with the reason for each; or the program is decomposed and has
            parts that are no sites any more; or an eval export has lost what modules may do in train; or the export may
            have lost a ``no_grad()`` inside an autocast region; or it is guessed which module decides.
    """
    if evaluation is None:
        return binding.bind(exported, keep=keep, dropout_p=dropout_p)
    for name, program in (("exported", exported), ("evaluation", evaluation)):
        if not isinstance(program, ExportedProgram):
            raise messages.NO_SECOND_PROGRAM.error(kind=type(program).__name__, argument=name)
    if keep or dropout_p:
        raise messages.KEEP_OF_TWO.error()
    if exported is evaluation:
        raise messages.ONE_PROGRAM_TWICE.error()
    ours, theirs = (
        {site.training for site in sites(program) if not site.modeless} for program in (exported, evaluation)
    )
    if True in theirs and True not in ours:
        raise messages.SWAPPED.error()
    module = assemble(exported, _sharing(exported, evaluation), {}, guess=True)
    say_guessed(module)
    return module


def _sharing(train: ExportedProgram, evaluation: ExportedProgram) -> ExportedProgram:
    """The second program around the state of the first.

    Raises:
        BindError: a parameter or buffer has another value there.
    """
    ours, theirs = _state(train), _state(evaluation)
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            raise messages.OTHER_WEIGHTS.error(name=name)
    state = {name: ours.get(name, value) for name, value in evaluation.state_dict.items()}
    own = evaluation.graph_signature.non_persistent_buffers
    constants = {name: ours.get(name, v) if name in own else v for name, v in evaluation.constants.items()}
    return pt2.with_state(evaluation, state, constants)


def _state(program: ExportedProgram) -> dict[str, torch.Tensor]:
    kept = {name: program.constants[name] for name in program.graph_signature.non_persistent_buffers}
    return {**program.state_dict, **{name: t for name, t in kept.items() if isinstance(t, torch.Tensor)}}
