"""CM6xx: warming up compiled modules."""

from compile_modes.errors import OptionError, OverrideError, WarmupError
from compile_modes.messages.entry import Error

NOT_MODES = Error("CM601", "modes is {modes!r}", 'pass ("train", "eval")', where="modes", raised=OptionError)
GRAD_KEYS = Error("CM602", "grad has keys {keys}", "use 'train' and 'eval'", where="grad", raised=OptionError)
NOT_A_STEP = Error(
    "CM603",
    "{mode!r} is not a mode",
    "use 'train', 'eval', 'current' or {{'layer1*': 'eval'}}",
    where="{where}",
    raised=OptionError,
)
NOT_A_GRAD = Error(
    "CM604",
    "{grad!r} is not a grad mode",
    'use True, False, "inference" or several',
    where="grad",
    raised=OptionError,
)
NO_SUCH_MODULE = Error(
    "CM605",
    "the pattern {pattern!r} matches no module",
    "names here: {names}",
    where="{where}",
    raised=OverrideError,
)
NO_SUBMODULES = Error(
    "CM606",
    "the pattern {pattern!r} matches no module",
    "the module has no submodules",
    where="{where}",
    raised=OverrideError,
)
NOT_COMPILED_YET = Error(
    "CM607",
    "nothing in {kind} is compiled",
    'pass what torch.compile(module, backend="pt2e_modes") returns, or call module.compile() before',
    raised=WarmupError,
)
LAZY = Error(
    "CM608",
    "a lazy module is not initialised yet",
    "call the eager module once",
    where="{name}",
    raised=WarmupError,
)
CALL_FAILED = Error(
    "CM609",
    "the module raised {error}",
    "call it with the same arguments, uncompiled; the module is as it was before the warm-up",
    where="warm-up in mode {mode!r}",
    raised=WarmupError,
)
