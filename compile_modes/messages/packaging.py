"""CM001 to CM029: packages, and what can have no place in one."""

from compile_modes.errors import OptionError, PackageError
from compile_modes.messages.entry import Error

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
