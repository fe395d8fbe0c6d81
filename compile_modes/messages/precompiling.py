"""CM060 to CM079: code that was compiled ahead for a module, and is put around it."""

from compile_modes.errors import ArchiveError, OptionError, PackageError
from compile_modes.messages.entry import Error

_AGAIN = "call precompile() again"

NO_BUNDLES = Error(
    "CM060",
    "this torch ({torch}) can't compile ahead: it has no {name}",
    "use torch 2.14 or newer; or torch.compile() and compile_modes.warmup()",
    raised=PackageError,
)
GRADIENTS_OF_NO_MODE = Error(
    "CM061",
    "gradients are asked for in what is none of the modes: {names}",
    "use some of these: {modes}",
    where="gradients",
    raised=OptionError,
)
BACKWARD_HOOKS = Error(
    "CM062",
    "submodules have hooks on their gradients, which compiled code doesn't run: {names}",
    "remove them, or use torch.compile()",
    raised=PackageError,
)
NO_BACKWARD = Error(
    "CM063",
    "mode {mode!r} was compiled without a backward, and gradients are enabled",
    "call it under torch.no_grad(); or name the mode in gradients= of precompile()",
    where="mode {mode!r}",
    raised=PackageError,
)
ATTRIBUTE_CHANGED = Error(
    "CM064",
    "the attribute {now}, and was {then} when the code was compiled",
    f"set it back, or {_AGAIN}",
    where="{name}",
    raised=PackageError,
)
HOOKS_CHANGED = Error(
    "CM065",
    "hooks were added or removed since the code was compiled",
    f"undo that, or {_AGAIN}",
    where="{name}",
    raised=PackageError,
)
OTHER_SURROUNDINGS = Error(
    "CM066",
    "the code was compiled for another state of torch: {what}",
    f"set it to that, or {_AGAIN} as it is now",
    raised=PackageError,
)
OTHER_MODULE = Error(
    "CM067",
    "the module isn't like the one that the code was compiled for: {difference}",
    f"load it around such a module, or {_AGAIN}",
    where="module",
    raised=PackageError,
)
NO_PICKLE = Error(
    "CM068",
    "code that was compiled ahead can't be pickled",
    "write it by save(), and the weights by torch.save(module.state_dict(), ...)",
    raised=PackageError,
)
NOT_PRECOMPILED = Error(
    "CM069",
    "the file wasn't written by Precompiled.save()",
    "read files of save() by compile_modes.load(), and those of package() by compile_modes.load_package()",
    raised=ArchiveError,
)
CODE_NOT_OPENED = Error(
    "CM070",
    "torch can't open the code of mode {mode!r}: {error}",
    f"see whether a compiler is there, which kernels need on another machine; or {_AGAIN}",
    raised=ArchiveError,
)
RESULTS_NOT_PICKLED = Error(
    "CM071",
    "what the module returns is of a class that can't be pickled: {error}",
    "let it return tuples, lists and dicts, or instances of classes that can be imported",
    raised=ArchiveError,
)
IS_PRECOMPILED = Error(
    "CM072",
    "the file holds code for a module, and no weights",
    "read it by compile_modes.load_precompiled()",
    raised=ArchiveError,
)
MADE_OF_OTHERS = Error(
    "CM073",
    "the {what} of a submodule are others than when the code was compiled",
    f"undo that, or {_AGAIN}",
    where="{name}",
    raised=PackageError,
)
INFERENCE_MODE = Error(
    "CM074",
    "mode {mode!r} was compiled with a backward, and doesn't run in inference mode",
    "call it under torch.no_grad()",
    where="mode {mode!r}",
    raised=PackageError,
)
TIED = Error(
    "CM075",
    "weights that were apart when the code was compiled are one now",
    f"give each a tensor of its own, or {_AGAIN}",
    raised=PackageError,
)
