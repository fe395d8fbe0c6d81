"""CM2xx: binding, baking and flipping programs."""

from compile_modes.errors import BindError, CallError
from compile_modes.messages.entry import Error, Warn

NO_GRAPH = Error(
    "CM201",
    "{kind} has no graph of ATen ops",
    "export it first: torch.export.export(model, args); an eager module needs no binding",
    raised=BindError,
)
TWO_PROGRAMS = Error(
    "CM202",
    "the module holds two programs, one for each mode",
    "use module.program(True) or module.program(False)",
    raised=BindError,
)
BOUND_ALREADY = Error(
    "CM203",
    "the module is bound already",
    "pass keep and dropout_p when binding a program",
    raised=BindError,
)
NAME_TAKEN = Error(
    "CM204",
    "the owner's name is taken by a {kind} of the exported module",
    "rename that submodule before export, or pass keep=({owner!r},)",
    where="owner {owner!r}, attribute {name!r}",
    raised=BindError,
)
NOT_EDITABLE = Error(
    "CM205",
    "an ExportedProgram can't be edited in place",
    "pass the module of its module(), or bind it",
    raised=BindError,
)
NOTHING_BOUND = Error(
    "CM206",
    "no site is bound",
    "use set_mode() on an unbound graph",
    where="{kind}",
    raised=BindError,
)
BAKED = Error(
    "CM207",
    "{method}() cannot act on baked modes",
    "call compile_modes.bind(module) first",
    raised=BindError,
)
NOT_OF_A_PROGRAM = Error(
    "CM208",
    "{kind} was not made from an ExportedProgram by bind(), nor by export()",
    "pass the ExportedProgram itself, or bind() it and pass the result",
    raised=BindError,
)
EDITED = Error(
    "CM209",
    "the module's graph was edited after it was bound",
    "pass a module that bind() returned",
    raised=BindError,
)
OTHER_STATE = Error(
    "CM210",
    "the program was exported with a {before}, the module has a {now}",
    "export again after changing dtypes, shapes or devices",
    where="{name}",
    raised=BindError,
)
NOT_IN_MODE = Error(
    "CM211",
    "something can't be put into the mode that was asked for, or may not be right there:\n{complaints}",
    "as said there, or pass allow_stuck=True to leave it as it is",
    raised=BindError,
)
NO_VALID_PROGRAM = Error(
    "CM212",
    "the graph is no valid program of torch.export: {error}",
    "undo what was done to the graph or its state since export",
    raised=BindError,
)
FOREIGN_VALUE = Error(
    "CM213",
    "the graph reads a value that its program does not hold",
    "undo what was done to the graph or its state since export",
    where="attribute {path!r}",
    raised=BindError,
)
RETURNS_MORE = Error(
    "CM214",
    "the program returns gradients or a loss",
    "export the forward alone",
    raised=BindError,
)
OTHER_PROGRAM = Error(
    "CM215",
    "no site of the module is in the program",
    "pass the program that the module was made from",
    where="{owners}",
    raised=BindError,
)
TOO_MANY_ARGUMENTS = Error(
    "CM216",
    "{count} arguments were given by position, and at most {most} can be",
    "give those by name that were exported by name, and no others",
    where="exported as forward{shown}",
    raised=CallError,
)
GIVEN_TWICE = Error(
    "CM217",
    "the argument {name!r} was given by position and by name",
    "give it once",
    where="exported as forward{shown}",
    raised=CallError,
)
ARGUMENT_MISSING = Error(
    "CM218",
    "the argument {name!r} is missing",
    "give it: the program has no default for it",
    where="exported as forward{shown}",
    raised=CallError,
)
NO_SUCH_ARGUMENT = Error(
    "CM219",
    "the program has no argument {name!r}",
    "leave it out, or export the model with it",
    where="exported as forward{shown}",
    raised=CallError,
)
NOT_ITS_DEFAULT = Error(
    "CM220",
    "the program has no argument {name!r}, which was at its default, {default!r}",
    "leave it out, or export the model with it",
    where="exported as forward{shown}",
    raised=CallError,
)
RETRACED_BY_POSITION = Error(
    "CM221",
    "torch.export can't take by position what was exported by name",
    "give it by name",
    where="exported as forward{shown}",
    raised=CallError,
)
STUCK = Warn(
    "CM230",
    "{count} sites keep their exported mode and will not follow train() and eval():\n{sites}",
    "export in {mode} mode, which keeps what they need",
)
STUCK_DECOMPOSED = Warn(
    "CM231",
    "{count} sites keep their exported mode and will not follow train() and eval():\n{sites}",
    "bind the program before run_decompositions()",
)
UNCOUNTED = Warn(
    "CM232",
    "num_batches_tracked of {owners} is not in the exported module and will not be counted (strict export in eval mode "
    "drops it).",
    "bind the ExportedProgram instead",
)
REUSED = Warn(
    "CM233",
    "{count} dropouts exported in eval mode have several users: {sites}\n  If the model uses the input of one of them "
    "again, train mode is wrong: in eval the two are one tensor, and export can't tell.",
    "export in train mode, or compile_modes.export(model, args)",
)
TRAIN_OVERRIDDEN = Warn(
    "CM234",
    "train() is overridden by {classes}, but that of a bound module sets all flags below it.",
    "after train(), call eval() on what that method keeps in eval; or bind with keep=[...]; "
    "or use compile_modes.export(model, args)",
)
RANDOM_IN_BOTH = Warn(
    "CM235",
    "random numbers of {owners} are drawn in both modes: one export can't tell whether they depend on mode.",
    "compile_modes.export(model, args), which can; or keep=[owner] if they don't",
)
DECOMPOSED_PROGRAM = Warn(
    "CM236",
    "the program is decomposed, and parts of it will not follow train() and eval():\n{parts}",
    "bind the program before run_decompositions()",
)
NOTHING_LEFT = Warn(
    "CM237",
    "{modules} left nothing in the eval export: unless they do nothing in train either, as Identity does, train() "
    "can't bring that back.",
    "export in train mode, or by compile_modes.export(model, args); or bind with keep=[...] if so",
)
NOT_MOVED = Warn(
    "CM238",
    "{count} sites can't be put into {mode} mode and keep theirs:\n{sites}",
    "export in {mode} mode, which keeps what they need",
)
MAY_HAVE_LOST_NO_GRAD = Warn(
    "CM239",
    "autocast regions of {owners} follow one another as they do where torch.export has split one at a no_grad() inside "
    "it, which it then drops: gradients may flow where eager stops them.",
    "compile_modes.export(model, args), which keeps it; or put no_grad() around the autocast region",
)
WRITTEN_IN_BOTH = Warn(
    "CM240",
    "{buffers} are written in both modes: one export, in train, can't tell whether eager writes them in eval.",
    "compile_modes.export(model, args), which can; or keep=[buffer] if it does",
)
