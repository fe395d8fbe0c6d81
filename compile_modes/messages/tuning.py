"""CM25x and CM26x: fine-tuning bound programs."""

from compile_modes.errors import OptionError, TuningError
from compile_modes.messages.entry import Error

TUNES_BOUND = Error(
    "CM250",
    "{what}() takes a bound module, and this {kind} isn't",
    "pass it to compile_modes.bind() first",
    raised=TuningError,
)
TUNES_ONE_GRAPH = Error(
    "CM251",
    "{what}() edits one graph with flags, and this module holds {holds}",
    "bind one program of the model, cm.bind(torch.export.export(model, args)); or change the eager model and export it",
    raised=TuningError,
)
NOT_GLOBS = Error(
    "CM252",
    "{patterns!r} is no glob and no list of globs",
    'pass "*.q_proj" or ("*.q_proj", "*.v_proj")',
    where="{where}",
    raised=OptionError,
)
MATCHES_NOTHING = Error(
    "CM253",
    "the pattern {pattern!r} matches no {kind}",
    "{near}",
    where="{where}[{pattern!r}]",
    raised=TuningError,
)
NOT_A_RANK = Error("CM254", "r is {r!r}", "pass a count of at least 1", where="r", raised=OptionError)
NOT_AN_ALPHA = Error("CM255", "alpha is {alpha!r}", "pass a positive number", where="alpha", raised=OptionError)
NOT_A_DROPOUT = Error(
    "CM256",
    "dropout is {dropout!r}",
    "pass a probability from 0 to below 1",
    where="dropout",
    raised=OptionError,
)
NO_TARGETS = Error(
    "CM257",
    "no layers are asked for",
    'pass globs of their names, such as targets=("*.q_proj",), or "*" for all',
    where="targets",
    raised=OptionError,
)
ALL_EXCLUDED = Error(
    "CM258",
    "exclude takes out every layer that targets names",
    "leave exclude out, or name other targets",
    where="exclude",
    raised=TuningError,
)
NO_ADAPTER = Error(
    "CM259",
    "the layer {layer!r} can't have an adapter: {why}",
    "leave it out: exclude=({layer!r},)",
    where="{where}",
    raised=TuningError,
)
NOTHING_TO_MERGE = Error(
    "CM260",
    "the module has no adapters of lora()",
    "adapters that were in the eager model before export are merged there",
    raised=TuningError,
)
NOT_MERGED = Error(
    "CM261",
    "the adapter of {layer!r} can't be folded: {why}",
    "keep the adapters, which save(), bake() and compilers take as they are; or leave that layer out of targets",
    where="{where}",
    raised=TuningError,
)
NO_ADAPTERS = Error(
    "CM262",
    "the module has no adapters of lora()",
    "call lora() on it first, with the targets and r that the adapters were made with",
    where="{what}",
    raised=TuningError,
)
LACKS_ADAPTERS = Error(
    "CM263",
    "the state lacks {names}",
    "call lora() with the targets that the adapters were made with, or use load_state_dict(state, strict=False)",
    where="load_lora",
    raised=TuningError,
)
FOREIGN_ADAPTER = Error(
    "CM264",
    "the module has nothing called {name!r}",
    "{near}",
    where="load_lora",
    raised=TuningError,
)
OTHER_SHAPE = Error(
    "CM265",
    "{name!r} has shape {given} in the state and {here} in the module",
    "call lora() with the r that the adapters were made with",
    where="load_lora",
    raised=TuningError,
)
NOTHING_TO_FREEZE = Error(
    "CM266",
    "no patterns are given",
    'pass globs of modules or parameters, such as "layer1*"',
    where="patterns",
    raised=OptionError,
)
NORM_NOT_BOUND = Error(
    "CM267",
    "the norm {norm!r} doesn't follow a flag",
    "explain() says why; set_mode(module, None, overrides={{{norm!r}: 'eval'}}) writes its literal",
    where="{where}",
    raised=TuningError,
)
NOT_A_HEAD = Error(
    "CM268",
    "the new head is a {kind}",
    "pass an eager nn.Module, such as nn.Linear(512, 10)",
    where="module",
    raised=TuningError,
)
NO_SUCH_HEAD = Error(
    "CM269",
    "no operation of the program belongs to a submodule {owner!r}",
    "{near}",
    where="owner",
    raised=TuningError,
)
NOT_REPLACED = Error(
    "CM270",
    "{owner!r} can't be replaced: {why}",
    "replace a module around it, or one within it",
    where="{where}",
    raised=TuningError,
)
HEAD_FAILS = Error(
    "CM271",
    "{kind} can't be called on what {owner!r} gets, {shapes}: {error}",
    "make one that takes inputs of these shapes and this dtype",
    where="submodule {owner!r}",
    raised=TuningError,
)
HEAD_DECIDES = Error(
    "CM272",
    "{kind} decides by its mode in Python, so that it isn't one graph",
    "use modules whose ops differ by a flag only, such as dropouts and norms",
    where="module",
    raised=TuningError,
)
HEAD_HAS_REGIONS = Error(
    "CM273",
    "{kind} has a region of its own in the graph (no_grad, autocast, a branch)",
    "leave these out of its forward",
    where="module",
    raised=TuningError,
)
HEAD_RETURNS = Error(
    "CM274",
    "{kind} returns something else than one tensor",
    "return one tensor from its forward, as the module that it replaces does",
    where="module",
    raised=TuningError,
)
HEAD_DOES_NOT_FIT = Error(
    "CM275",
    "what follows {owner!r} doesn't take what the new module returns: {error}",
    "return the shape and dtype that the old one returned, or replace a module around it that holds what follows",
    where="{where}",
    raised=TuningError,
)
NOT_COPIED = Error(
    "CM276",
    "{kind} can't be copied, and update_bn() runs a copy of it that shares its state: {error}",
    "take out of the module what copy.deepcopy() fails on",
    where="update_bn",
    raised=TuningError,
)
NORM_NOT_AVERAGED = Error(
    "CM277",
    "the norm {norm!r} is in a form that can't average over batches: {op}",
    "bind the program before run_decompositions()",
    where="{where}",
    raised=TuningError,
)
