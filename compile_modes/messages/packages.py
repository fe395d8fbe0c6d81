"""CM0xx: packages, compiled ahead of time."""

from compile_modes.errors import ArchiveError, CallError, OptionError, PackageError
from compile_modes.messages.entry import Error

_REMAKE = "package the model again, on a machine like this one and with this torch"

PACKAGE_MODES = Error(
    "CM001",
    "modes is {modes!r}",
    'pass ("train", "eval"), or {{"train": "train", "mc": {{"*.drop": "train", "*": "eval"}}}}',
    where="modes",
    raised=OptionError,
)
MODE_NAME = Error(
    "CM002",
    "{name!r} can't be the name of a mode",
    "use letters, digits and underscores",
    where="modes",
    raised=OptionError,
)
NO_VECTOR = Error(
    "CM003",
    "{mode!r} is not a mode",
    "use 'train', 'eval', or globs of submodules: {{'*.drop': 'train', '*': 'eval'}}",
    where="modes[{name!r}]",
    raised=OptionError,
)
SAME_VECTOR = Error(
    "CM004",
    "modes {one!r} and {other!r} have the same flags wherever a flag makes a difference",
    "leave one of them out",
    where="modes",
    raised=OptionError,
)
NO_AOT_TRAINING = Error(
    "CM005",
    "torch {torch} has no {name}, which packages are made and called with",
    "use a torch that compile_modes was checked on: 2.14.1 or 2.15.0",
    raised=PackageError,
)
NOT_A_LOSS = Error(
    "CM006",
    "loss is a {kind}",
    "pass a function of the outputs and the targets that returns a scalar tensor",
    where="loss",
    raised=OptionError,
)
TARGETS_WITHOUT_LOSS = Error(
    "CM007",
    "targets are no tuple, or there is no loss that takes them, or a loss and no mode 'train'",
    "pass loss=function and targets=(example, ...) together, and 'train' among the modes",
    where="targets",
    raised=OptionError,
)
FIXED_OPTION = Error(
    "CM008",
    "packages need these options of Inductor as they are: {names}",
    "leave them out",
    where="options",
    raised=OptionError,
)
ARGS_NO_TUPLE = Error("CM009", "args is a {kind}", "pass a tuple of arguments", where="args", raised=OptionError)
SHAPES_OF_BOUND = Error(
    "CM010",
    "the module is bound, and which of its sizes vary is known from its program",
    "leave dynamic_shapes out, or pass the eager module",
    where="dynamic_shapes",
    raised=OptionError,
)
STRANGE_INPUT = Error(
    "CM011",
    "among the arguments is {what}, which has no place in a package",
    "pass tensors, numbers, strings, None, and tuples, lists and dicts of these",
    where="args",
    raised=PackageError,
)
STRANGE_OUTPUT = Error(
    "CM012",
    "the module returns {what}, which has no place in a package",
    "return tensors, numbers, strings, None, and containers of these that torch.utils._pytree knows",
    raised=PackageError,
)
OTHER_INPUTS = Error(
    "CM013",
    "{given} tensors are given, and the module's program takes {wanted}, or of other dimensions",
    "pass arguments like those that it was exported with, all by position",
    where="args",
    raised=PackageError,
)
NO_LOSS = Error(
    "CM014",
    "the first tensor that the module returns is no scalar loss: {loss}",
    "pass loss=, a function of the outputs and the targets that returns one",
    where="loss",
    raised=PackageError,
)
NO_SCALAR = Error(
    "CM015",
    "loss() returns no scalar of a floating-point type: {loss}",
    "return the mean, or the sum",
    where="loss",
    raised=PackageError,
)
NO_GRADIENT = Error(
    "CM016",
    "no parameter has a gradient of the loss",
    "call requires_grad_() on what shall be trained, or package modes other than 'train'",
    where="modes['train']",
    raised=PackageError,
)
MODE_FAILS = Error(
    "CM017",
    "torch can't export the module in mode {mode!r}: {error}",
    "see the exception that caused this one",
    where="modes[{mode!r}]",
    raised=PackageError,
)
NOT_COMPILABLE = Error(
    "CM018",
    "Inductor can't compile mode {mode!r} ahead of time: {error}",
    "see the exception that caused this one; on a CPU, it needs a C++ compiler",
    where="modes[{mode!r}]",
    raised=PackageError,
)
WRITES_INPUTS = Error(
    "CM019",
    "the module writes into its arguments",
    "copy them first: a package doesn't give them back",
    raised=PackageError,
)
STRANGE_STATE = Error(
    "CM020",
    "mode {mode!r} takes what has no place in a package: {kinds}",
    "keep tensors in parameters and buffers, and no objects of other kinds",
    where="modes[{mode!r}]",
    raised=PackageError,
)
STRANGE_SIZE = Error(
    "CM021",
    "the size {size} isn't a multiple of one size that varies, and a sum",
    "let fewer sizes vary",
    where="{name}",
    raised=PackageError,
)
STRANGE_WEIGHT = Error(
    "CM022",
    "the tensor has no plain bytes: {what}",
    "make it a dense tensor on a CPU or a GPU",
    where="{name}",
    raised=PackageError,
)
SEVERAL_DEVICES = Error(
    "CM023",
    "weights are on several devices: {where}",
    "move the module to one device",
    raised=PackageError,
)
SPECIALIZED = Error(
    "CM024",
    "torch has fixed sizes that were to vary: {inputs}",
    "leave them out of dynamic_shapes, or change what fixes them: TORCH_LOGS=+dynamic says what",
    where="modes[{mode!r}]",
    raised=PackageError,
)
HELD_BY_LOSS = Error(
    "CM025",
    "the loss uses what trains, or writes to what it holds, beside the outputs and the targets: {held}",
    "compute that part in the model and return it, and let loss() take it from there",
    where="loss",
    raised=PackageError,
)
STRANGE_CONDITION = Error(
    "CM026",
    "the model asks something of its arguments that a package can't check: {condition}",
    "leave what it is about out of dynamic_shapes",
    where="dynamic_shapes",
    raised=PackageError,
)
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
    "the package holds no mode {mode!r}",
    "use one of these: {modes}",
    where="mode",
    raised=PackageError,
)
FLAGS_NOT_PACKAGED = Error(
    "CM041",
    "no mode of the package has these flags: {flags}",
    "call mode() with one of these: {modes}; or package that mode too",
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
    "the tensor is {given}; the package takes {wanted}",
    "convert it",
    where="{name}",
    raised=CallError,
)
INPUT_SIZE = Error(
    "CM044",
    "the tensor has the shape {given}; the package takes {wanted}",
    "pass such a shape, or package with dynamic_shapes",
    where="{name}",
    raised=CallError,
)
INPUT_NEEDS_GRAD = Error(
    "CM045",
    "the tensor requires a gradient, which the package has not been compiled to compute",
    "detach it",
    where="{name}",
    raised=CallError,
)
REPLACED = Error(
    "CM046",
    "the weight is now {now}; the package was compiled for {wanted}",
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
    "the parameter requires a gradient, and was packaged without",
    "call requires_grad_(False) on it, or package the model again with it trained",
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
    "the submodule isn't the one that was loaded: a package runs its own code, whatever takes a place in it",
    "put it back, and give it values by load_state_dict(); or package the model with the other one",
    where="{name}",
    raised=PackageError,
)
WEIGHT_GONE = Error(
    "CM053",
    "the weight isn't there any more, and the package's code needs it",
    "put it back: parametrizations and pruning belong to the model, before it is packaged",
    where="{name}",
    raised=PackageError,
)
