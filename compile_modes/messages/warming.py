"""CM6xx: warming up compiled modules."""

from compile_modes.errors import OptionError, OverrideError, WarmupError
from compile_modes.messages.entry import Error, Warn

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
NOT_PICKLABLE = Error(
    "CM610",
    "the module, or what it is called with, can't be taken to another process: {error}",
    "keep its classes and functions at the top level of importable modules, or warm up without background=True",
    where="background",
    raised=WarmupError,
)
IN_MAIN = Error(
    "CM611",
    "{name} is defined in __main__, which another process can't import",
    "move it into a module of its own, and import it from there; or warm up without background=True",
    where="background",
    raised=WarmupError,
)
NO_CACHE = Error(
    "CM612",
    "torch's caches of compiled code are off, and another process could not hand over what it has compiled",
    "let torch._inductor.config.fx_graph_cache and force_disable_caches be as they were, or warm up without "
    "background=True",
    where="background",
    raised=WarmupError,
)
BACKGROUND_FAILED = Warn(
    "CM613",
    "the warm-up in the background has failed: {error}",
    "the modes will be compiled when they are first used; to see more, call warmup() without background=True",
    where="warmup(background=True)",
)
