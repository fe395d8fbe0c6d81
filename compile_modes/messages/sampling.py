"""CM15x: stochastic passes."""

from compile_modes.errors import OptionError, SampleError
from compile_modes.messages.entry import Error, Warn

NOT_SAMPLED = Error(
    "CM150",
    "a {kind} can't be sampled from",
    "pass an nn.Module: eager, compiled, or what compile_modes.bind() or export() returns",
    raised=SampleError,
)
NOT_REPETITIONS = Error(
    "CM151",
    "{name} is {value!r}",
    "pass a positive whole number{other}",
    where="{name}",
    raised=OptionError,
)
NOT_A_REDUCTION = Error(
    "CM152",
    "reduce is {reduce!r}",
    'pass None for all results, "mean_std", or a function (state, output) -> state; state is None at first',
    where="reduce",
    raised=OptionError,
)
NOT_PATTERNS = Error(
    "CM153",
    "which is {which!r}",
    'pass globs of names of modules: which=("head.*",)',
    where="which",
    raised=OptionError,
)
NOTHING_RANDOM = Error(
    "CM154",
    "nothing in {kind} draws random numbers in train, so that all repetitions would be the same",
    "give it a dropout with p > 0; a program that was exported needs compile_modes.bind(), and what an eval export has "
    "lost, compile_modes.explain() lists",
    raised=SampleError,
)
OTHER_OUTPUTS = Error(
    "CM155",
    "in train the module returns something else than in eval: {train} instead of {evaluation}",
    "leave it out by which=, or let a module of its own decide about the outputs",
    where="{owner}",
    raised=SampleError,
)
WRITES_IN_TRAIN = Error(
    "CM156",
    "in train the module does more than draw random numbers: {what}",
    "leave it out by which=, or give what draws random numbers a module of its own",
    where="{owner}",
    raised=SampleError,
)
NOT_CAPTURED = Warn(
    "CM157",
    "{kind} is called once per repetition, for no graph can be made of it: {why}",
    "have Python decide nothing by values of tensors, or use the results as they are: they are right, only slow",
    where="sample",
)
LOOPED = Warn(
    "CM158",
    "{op} can't run for many repetitions at once: what follows the first random number runs once per repetition. {why}",
    "replace the op, or use the results as they are: they are right, only slow",
    where="{owner}",
)
NOT_STACKED = Error(
    "CM159",
    "a repetition returns {now}, an earlier one {before}, which can't be put together",
    "use reduce= with a function, which gets each result by itself",
    where="output {path}",
    raised=SampleError,
)
NO_MOMENTS = Error(
    "CM160",
    "there is no deviation of one repetition",
    "pass n=2 or more",
    where='reduce="mean_std"',
    raised=OptionError,
)
NOT_BOUND_YET = Error(
    "CM161",
    "the modes of an exported program are literals in its graph",
    "pass what compile_modes.bind() returns for it",
    raised=SampleError,
)
NOT_A_SEED = Error("CM162", "seed is {seed!r}", "pass a whole number, or None", where="seed", raised=OptionError)
