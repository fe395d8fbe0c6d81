"""CM950 to CM969: trainers of other libraries."""

from compile_modes.errors import MissingLibraryError, OptionError
from compile_modes.messages.entry import Error, Warn

NO_LIBRARY = Error(
    "CM950",
    "{library} can't be imported: {error}",
    "pip install {install}",
    where="{file}",
    raised=MissingLibraryError,
)
NOT_A_COMPILE_OPTION = Error(
    "CM951",
    "torch.compile takes no {name!r}",
    "it takes {near}",
    where="CompileCallback",
    raised=OptionError,
)
WRAPPED_BEFORE = Error(
    "CM952",
    "{kind} is what torch.compile returns, whose signature is (*args, **kwargs), so that trainers drop all columns",
    "give the trainer the module itself: the callback compiles it in place",
    where="{name}",
    raised=OptionError,
)
NO_SUCH_CHILD = Error(
    "CM953",
    "the model has no module {name!r}",
    "names here: {names}",
    where="modules",
    raised=OptionError,
)
ONE_IN_ANOTHER = Error(
    "CM954",
    "{inner!r} is a part of {outer!r}, which is compiled as a whole",
    "name one of the two",
    where="modules",
    raised=OptionError,
)
NOTHING_TO_COMPILE = Error(
    "CM955",
    "{kind} has neither a forward() of its own nor a child with parameters",
    'name what is to be compiled: CompileCallback(modules=["net"])',
    where="modules",
    raised=OptionError,
)
NEVER_CALLED = Warn(
    "CM956",
    "{names} was compiled, and no training or validation step has called it",
    'name the modules that the steps call: CompileCallback(modules=["net"])',
)
EVAL_NOT_WARM = Warn(
    "CM957",
    "eval could not be warmed up with the arguments of the first training step: {error}",
    "warmup=False, for a model that is called otherwise in eval: the first validation loop compiles it then. After a "
    "failed attempt, Dynamo may run eval uncompiled",
    where="{name}",
)
COMPILED_AGAIN = Warn(
    "CM958",
    "{loop} loop {number} compiled {graphs} graphs, which took {seconds} s: calls differ from those before in more "
    "than the size of the batch",
    'dynamic=True for sizes that vary; TORCH_LOGS="recompiles" says what has changed',
)
