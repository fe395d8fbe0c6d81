"""``precompile``: the code of several modes of a module, compiled before it is called, and put around it."""

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from compile_modes import messages
from compile_modes._compat import bundling
from compile_modes.errors import few
from compile_modes.exported.provenance import flags, set_flags
from compile_modes.forms.lower import lower
from compile_modes.graph.finding import sites
from compile_modes.package import ahead_file
from compile_modes.package.ahead import Ahead, Code, apart, differences, held, surroundings, weights_of
from compile_modes.package.asking import Vector, asked, bound_of, deciders, flags_in, unwrapped, vectors
from compile_modes.package.precompiled import Precompiled
from compile_modes.package.programs import Examples, Program, examples_of, plain_program_of
from compile_modes.package.running import Slot
from compile_modes.package.signature import compiled
from compile_modes.package.structure import Strange, describe
from compile_modes.package.watch import Watch, difference


def precompile(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    modes: Sequence[str] | Mapping[str, Any] = ("train", "eval"),
    gradients: Collection[str] | None = None,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Precompiled:
    """Compiles some modes of a module ahead, backward too, so that no call compiles, here or where the code is loaded.

    What ``torch.compile`` compiles at the first call in each mode is compiled here, and kept under the flags that it is
    for. A call in any other mode is refused by name; it doesn't get another mode's result. :meth:`Precompiled.save`
    writes the code without weights, for :func:`load_precompiled`.

    Args:
        module: an eager module that :func:`export` can take, or a bound module. It stays as it is, and its weights are
            those of the result.
        args: positional arguments to call it with: tensors, constants that are compiled in, and tuples, lists and dicts
            of these. An argument that requires a gradient gets one.
        kwargs: the same, by name.
        modes: "train" and "eval", one or both; or the flags of each mode by its name, as for :func:`package`.
        gradients: the modes that have a backward. By default, those in which the module itself is in train; call the
            others under ``torch.no_grad()``.
        dynamic_shapes: of the arguments, for an eager module, as for ``torch.export.export``. A bound module has the
            sizes of its program.
        options: Inductor's options.

    Returns:
        A module that calls the code. Autocast and the like have to be at each call as they are now.

    Raises:
        PackageError: a mode can't be exported or compiled, or needs what the code can't have.
        OptionError: a mode is none, or two are the same.
        OverrideError: a glob matches no submodule.
        ExportError: the module can't be exported, see :func:`export`.
    """
    if lacking := bundling.missing():
        raise messages.NO_BUNDLES.error(torch=torch.__version__, name=lacking)
    module = unwrapped(module)
    wanted = asked(modes)
    if strange := sorted(set(gradients or ()) - wanted.keys()):
        raise messages.GRADIENTS_OF_NO_MODE.error(names=few(map(repr, strange)), modes=few(map(repr, wanted)))
    if hooked := Watch(module).backward_hooks():
        raise messages.BACKWARD_HOOKS.error(names=few(hooked))
    before = flags(module)
    try:
        bound, names = bound_of(module, args, kwargs, dynamic_shapes)
    finally:
        set_flags(module, before)
    flagged = vectors(bound, wanted)
    examples = examples_of(bound, (*args, *(kwargs or {}).values()), (), names, tuple(kwargs or ()))
    needs = _needs(args, kwargs)
    codes = {}
    with bundling.own_cache() as kernels_of:
        for mode, vector in flagged.items():
            backward = vector[""] if gradients is None else mode in gradients
            code = _code(module, bound, mode, vector, examples, needs, backward, dict(options or {}))
            codes[mode] = replace(code, flags=flags_in(module, wanted[mode]))
        kernels = kernels_of()
    read = {name: None for code in codes.values() for name in code.reads if name not in code.constants}
    weights, ties = weights_of(module, list(read))
    trained = {name for name, slot in held(module).items() if _is_trained(slot)}
    device = next((t.device for t in (*module.parameters(), *module.buffers(), *examples.tensors)), torch.device("cpu"))
    functions = ahead_file.opened(codes, kernels)
    around, arguments = surroundings(device), examples.nodes[0]
    keywords = len(kwargs or {})
    ahead = Ahead(
        codes, functions, kernels, deciders(bound), names, keywords, arguments, weights, trained, ties, device, around
    )
    return Precompiled(module, ahead)


def load_precompiled(path: str | os.PathLike[str], module: nn.Module) -> Precompiled:
    """Reads what :meth:`Precompiled.save` has written, and puts it around a module of the same kind.

    Nothing is compiled, if Inductor finds the compiler that it had; on a CPU, kernels are compiled again otherwise.
    **The file is unpickled, and holds native code**: trust it as you would a Python script.

    Args:
        path: the file.
        module: the eager module, or the bound one, with any weights: shapes, strides and dtypes have to be the same,
            and so do the code of its classes, and the attributes that its submodules hold.

    Returns:
        The module with the code around it, in its own mode.

    Raises:
        ArchiveError: there is no such file, it is damaged, or another kind of file; or it was compiled with another
            torch, or for another device or machine.
        PackageError: the module is another one.
    """
    if lacking := bundling.missing():
        raise messages.NO_BUNDLES.error(torch=torch.__version__, name=lacking)
    module = unwrapped(module)
    ahead, python = ahead_file.read(os.fspath(path))
    if said := difference(python, Watch(module).described()):
        raise messages.OTHER_MODULE.error(difference=said)
    state = ahead.state(module)
    for name in ahead.weights:
        if name not in state.slots:
            raise messages.WEIGHT_GONE.error(name=name)
        state.check(name, state.get(name))
    state.check_ties()
    if changed := differences(ahead.around, surroundings(ahead.device)):
        raise messages.OTHER_SURROUNDINGS.error(what=few(changed))
    return Precompiled(module, ahead)


def _needs(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[bool]:
    """Of each tensor in the arguments, whether it requires a gradient."""
    tensors: list[torch.Tensor] = []
    with contextlib.suppress(Strange):  # said by examples_of()
        describe((*args, *(kwargs or {}).values()), tensors)
    return [tensor.requires_grad for tensor in tensors]


def _code(
    module: nn.Module,
    bound: nn.Module,
    mode: str,
    vector: Vector,
    examples: Examples,
    needs: Sequence[bool],
    backward: bool,
    options: dict[str, Any],
) -> Code:
    """The code of one mode."""
    program = plain_program_of(bound, mode, vector, examples, gradients=backward)
    specs = program.exported.graph_signature.input_specs
    reads = [str(spec.target) for spec in specs if spec.kind is not InputKind.USER_INPUT]
    values = {**program.exported.state_dict, **program.exported.constants}
    found = held(module)
    constants = {name: values[name].detach() for name in reads if name not in found}
    if lost := sorted(set(program.writes) & constants.keys()):
        raise messages.STRANGE_STATE.error(mode=mode, kinds=few(map(repr, lost)))
    asked_for = [name in found and _is_trained(found[name]) for name in reads] + list(needs)
    wanted = [backward and one for one in asked_for]
    data, guards = _bundled(mode, program, wanted, backward, options)
    signature = program.signature.told(guards)
    places = apart(found[name][0][found[name][1]] for name in reads if name in found)
    return Code(data, {}, backward, signature, wanted[len(reads) :], reads, places, constants, program.tree)


def _is_trained(slot: Slot) -> bool:
    holder, leaf = slot
    return holder[leaf] is not None and bool(holder[leaf].requires_grad)


def _bundled(
    mode: str, program: Program, wanted: list[bool], backward: bool, options: dict[str, Any]
) -> tuple[bytes, list[str]]:
    graph = program.exported.graph_module

    def bundle() -> tuple[bytes, list[str]]:
        bundling.set_leaves(graph, wanted)
        with torch.enable_grad() if backward else torch.no_grad():
            lower(graph, sites(graph))
        return bundling.bundled(program.exported, backward, options)

    return compiled(mode, program.signature, program.exported, bundle)
