"""``save`` and ``load``: a module with modes in one ``.pt2`` file."""

from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes.archive import programs as archive
from compile_modes.archive.container import FileLike, label
from compile_modes.exported.assembling import reassemble
from compile_modes.exported.binding import bind
from compile_modes.exported.provenance import Source, flags, set_flags


def save(module: nn.Module, path: FileLike) -> None:
    """Writes a module with modes into one file, each weight once.

    Stored are the program or programs that the module was made from, the present values of its parameters and buffers
    (also whether they require gradients), and the present modes. ``torch.export.pt2_archive`` can read the programs.

    Args:
        module: what :func:`compile_modes.bind` made of an ExportedProgram, or :func:`compile_modes.export` of a model;
            or an OptimizedModule around it.
        path: the file, by convention ``.pt2``; or a binary file object. A file appears whole or not at all.

    Raises:
        ArchiveError: the module was not made so or its graph was edited since, it can't be stored, or the file can't be
            written.
    """
    module = getattr(module, "_orig_mod", module)
    source = Source.of(module)
    if source is None:
        raise messages.NOT_SAVABLE.error(kind=type(module).__name__, file=label(path))
    if not source.made(module):
        raise messages.EDITED_SINCE.error(file=label(path))
    held = dict(module.named_buffers(remove_duplicate=False)) | dict(module.named_parameters(remove_duplicate=False))
    names = {n for p in source.programs.values() for n in (*p.state_dict, *p.graph_signature.non_persistent_buffers)}
    notes: dict[str, Any] = {"flags": flags(module), "keep": list(source.keep), "dropout_p": dict(source.dropout_p)}
    notes |= {"known": source.known}
    archive.write(path, source.programs, notes, {name: held[name] for name in names if name in held})


def load(path: FileLike) -> nn.Module:
    """Reads what :func:`save` has written: a module with the same weights, in the same modes, that can be switched.

    Needs neither the model's class nor what it was made with. A graph is code: don't load files that you don't trust.

    Args:
        path: the file, or a binary file object.

    Raises:
        ArchiveError: there is no such file, it is damaged, or it is another kind of file.
    """
    programs, notes = archive.read(path)
    modes, keep, dropout_p = (notes.get(key) for key in ("flags", "keep", "dropout_p"))
    if isinstance(modes, dict) and isinstance(keep, list) and isinstance(dropout_p, dict):
        if programs.keys() >= {"train", "eval"}:
            return reassemble(programs, modes, notes.get("known", {"together": False}))
        if programs.keys() == {"model"}:
            module: nn.Module = bind(programs["model"], keep=keep, dropout_p=dropout_p or None)
            set_flags(module, modes)
            return module
    raise messages.OTHER_WRITER.error(file=label(path))
