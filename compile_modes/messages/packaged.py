"""CM030 to CM059: packages read from files, and called."""

from compile_modes.errors import ArchiveError, CallError, PackageError
from compile_modes.messages.entry import Error

_REMAKE = "package the model again, on a machine like this one and with this torch"
# Those of files get their place from container.reading().
NO_PACKAGE = Error(
    "CM030",
    "the file was written by save(), and holds no compiled code",
    "read it by compile_modes.load(); package() writes packages",
    raised=ArchiveError,
)
NEWER_PACKAGE = Error(
    "CM031",
    "the package has format {format}, written with torch {torch}; the one known is {newest}",
    "use the compile_modes that wrote it, or package the model again",
    raised=ArchiveError,
)
IS_PACKAGE = Error(
    "CM032",
    "the file is a package of compiled code",
    "read it by compile_modes.load_package()",
    raised=ArchiveError,
)
OTHER_TORCH = Error(
    "CM033",
    "the package was compiled with torch {theirs}, and this is {ours}",
    _REMAKE,
    raised=ArchiveError,
)
OTHER_MACHINE = Error(
    "CM034",
    "the package was compiled for another kind of machine: {what} {theirs}, here {ours}",
    _REMAKE,
    raised=ArchiveError,
)
OTHER_CPU = Error(
    "CM035",
    "the package was compiled for a CPU with instructions that this one lacks: {lacking}",
    _REMAKE,
    raised=ArchiveError,
)
NO_DEVICE = Error(
    "CM036",
    "the package was compiled for {device}, which isn't there",
    "package the model on the CPU, or run it where there is such a device",
    raised=ArchiveError,
)
NOT_OPENED = Error(
    "CM037",
    "torch can't open the library of mode {mode!r}: {error}",
    "see whether there is room for temporary files and libraries may be loaded from there (TMPDIR); or package again",
    raised=ArchiveError,
)
NOT_PACKAGED = Error(
    "CM040",
    "there is no code for a mode {mode!r}",
    "use one of these: {modes}",
    where="mode",
    raised=PackageError,
)
FLAGS_NOT_PACKAGED = Error(
    "CM041",
    "there is no code for these flags: {flags}",
    "call mode() with one of these: {modes}; or compile that mode too",
    raised=PackageError,
)
OTHER_CALL = Error(
    "CM042",
    "the call isn't like the one that was compiled: {what}",
    "call it with {wanted}",
    where="mode {mode!r}",
    raised=CallError,
)
INPUT_KIND = Error(
    "CM043",
    "the tensor is {given}; the code takes {wanted}",
    "convert it",
    where="{name}",
    raised=CallError,
)
INPUT_SIZE = Error(
    "CM044",
    "the tensor has the shape {given}; the code takes {wanted}",
    "pass such a shape, or compile with dynamic_shapes",
    where="{name}",
    raised=CallError,
)
INPUT_NEEDS_GRAD = Error(
    "CM045",
    "the tensor requires a gradient, which the code has not been compiled to compute",
    "detach it",
    where="{name}",
    raised=CallError,
)
REPLACED = Error(
    "CM046",
    "the weight is now {now}; the code was compiled for {wanted}",
    "give it values by load_state_dict() or copy_(), which keep the tensor as it is",
    where="{name}",
    raised=PackageError,
)
UNTIED = Error(
    "CM047",
    "the weight was one with {other!r}, and isn't any more",
    "load values by load_state_dict() without assign=True, or tie them again",
    where="{name}",
    raised=PackageError,
)
NOT_TRAINED = Error(
    "CM048",
    "the parameter requires a gradient, and was compiled without",
    "call requires_grad_(False) on it, or compile the model again with it trained",
    where="{name}",
    raised=PackageError,
)
BACKWARD_TWICE = Error(
    "CM049",
    "backward() was called a second time for one call",
    "call the module again: its gradients are handed over once",
    raised=PackageError,
)
NO_COPIES = Error(
    "CM050",
    "a loaded package can be neither copied nor pickled",
    "load the file again, and give it the weights by load_state_dict()",
    raised=PackageError,
)
CONDITION = Error(
    "CM051",
    "the model was compiled for sizes such that {condition}; given are {sizes}",
    "pass such sizes, or let fewer of them vary in dynamic_shapes",
    where="the arguments",
    raised=CallError,
)
SUBMODULE_REPLACED = Error(
    "CM052",
    "the submodule isn't the one that was compiled or loaded: compiled code runs on, whatever takes a place",
    "put it back, and give it values by load_state_dict(); or compile the model with the other one",
    where="{name}",
    raised=PackageError,
)
WEIGHT_GONE = Error(
    "CM053",
    "the weight isn't there any more, and the compiled code needs it",
    "put it back: parametrizations and pruning belong to the model, before it is compiled",
    where="{name}",
    raised=PackageError,
)
