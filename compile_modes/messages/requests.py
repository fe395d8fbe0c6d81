"""CM1xx: what was asked for, in options and arguments, and can't be had."""

from compile_modes.errors import OptionError, OverrideError
from compile_modes.messages.entry import Error, Warn

NOT_TRAINING = Error(
    "CM101",
    "training is {training!r}",
    "pass True, False, or None to leave the modes alone",
    raised=OptionError,
)
NOT_OVERRIDES = Error(
    "CM102",
    "overrides is a {kind}",
    'pass {{"layer4.*": "eval"}}',
    raised=OptionError,
)
NOT_A_GLOB = Error(
    "CM103",
    "{pattern!r} is not an owner glob",
    "pass {example}",
    where="{where}",
    raised=OptionError,
)
NOT_A_MODE = Error(
    "CM104",
    "{mode!r} is not a mode",
    "use 'train' or 'eval'",
    where="{where}[{pattern!r}]",
    raised=OptionError,
)
NOT_A_MAPPING = Error(
    "CM105",
    "{dropout_p!r} is no mapping",
    'pass {{"layers.*.self_attn": 0.1}}',
    where="dropout_p",
    raised=OptionError,
)
NOT_A_PROBABILITY = Error(
    "CM106",
    "{p!r} is no probability",
    "pass a number from 0 to below 1",
    where="dropout_p[{pattern!r}]",
    raised=OptionError,
)
HAS_PROBABILITY = Error(
    "CM107",
    "{site} has kept its own probability",
    "leave it out: dropout_p is for what an eval export has lost",
    where="dropout_p[{pattern!r}]",
    raised=OptionError,
)
NOT_A_LIST = Error(
    "CM108",
    "{keep!r} is not a list of owner globs",
    'pass keep=["head.*"]',
    where="keep",
    raised=OptionError,
)
NO_SUCH_OWNER = Error(
    "CM109",
    "the pattern {pattern!r} matches no {kind} site",
    "owners here: {owners}",
    where="{argument}[{pattern!r}]",
    raised=OverrideError,
)
NO_OWNERS = Error(
    "CM110",
    "the pattern {pattern!r} matches no {kind} site",
    "this graph has no such site",
    where="{argument}[{pattern!r}]",
    raised=OverrideError,
)
NOT_A_COMPILE_MODE = Error(
    "CM120",
    "{mode!r} is not a mode of torch.compile",
    "{suggestion}",
    where="mode",
    raised=OptionError,
)
NOT_A_NUMBER = Error(
    "CM121",
    "mode_vectors is {vectors!r}",
    "pass how many to keep, at least 1",
    where="options",
    raised=OptionError,
)
UNKNOWN_OPTION = Error(
    "CM122",
    "{key!r} is an option neither of pt2e_modes nor of Inductor",
    "{suggestion}",
    where="options",
    raised=OptionError,
)
NOT_A_SWITCH = Error(
    "CM123",
    "{name} is {value!r}",
    "pass True or False",
    where="options",
    raised=OptionError,
)
NOT_A_FREEZE = Error(
    "CM124",
    "freeze is {freeze!r}",
    "pass 'auto', which sees nearly all writes to weights, 'strict', which compares all bytes at each call, or False",
    where="options",
    raised=OptionError,
)
NOT_DATA = Error(
    "CM125",
    "modes is {modes!r}",
    'pass "data", or leave it out: Dynamo then guards on each mode',
    where="options",
    raised=OptionError,
)
DATA_AND_ASKED = Error(
    "CM126",
    "modes is 'data', and {asked} is given as well",
    "leave out either: with modes as data, the flags decide, and one graph is for both modes",
    where="options",
    raised=OptionError,
)
SWITCH_AS_DATA = Error(
    "CM127",
    "modes is 'data', but Python decides by the flag of {owners}: each branch is a graph of its own",
    "leave the option out: Dynamo then guards on each mode",
    where="options",
    raised=OptionError,
)
INDISTINCT = Error(
    "CM130",
    "the pattern {pattern!r} names parts of one of several exported modules that can't be told apart",
    "set the flag, by train() or eval(): they have no state, by which a graph would show them",
    where="overrides[{pattern!r}], {modules}",
    raised=OverrideError,
)
PART_OF_KERNEL = Error(
    "CM131",
    "the pattern {pattern!r} names parts of a fused kernel of inference",
    "call torch.backends.mha.set_fastpath_enabled(False) first, or run the model with gradients",
    where="overrides[{pattern!r}], {site}",
    raised=OverrideError,
)
READ_IN_PYTHON = Error(
    "CM132",
    "the pattern {pattern!r} names modules that have no mode-dependent op: Python reads their flag",
    "set the flag itself, by train() or eval() of that module",
    where="overrides[{pattern!r}], {modules}",
    raised=OverrideError,
)
EAGER_RNN = Error(
    "CM133",
    "Dynamo leaves {kind} modules to eager mode, where options can't reach",
    "set torch._dynamo.config.allow_rnn = True, or set the flag, by train() or eval()",
    where="owner {owner!r}",
    raised=OverrideError,
)
SITES_REFUSED = Error(
    "CM134",
    "{count} sites can't be put into the mode that was asked for:\n{sites}",
    "leave them out by a pattern of their own that comes first, such as {example}",
    raised=OverrideError,
)
SITES_LACK_P = Error(
    "CM135",
    "{count} sites can't be put into the mode that was asked for:\n{sites}",
    "leave them out by a pattern of their own that comes first, such as {example}; "
    "or say what it has lost, 0.0 for none: options={{'dropout_p': {{{owner!r}: 0.1}}}}",
    raised=OverrideError,
)
OVERRIDES_REFUSED = Error(
    "CM136",
    "overrides name sites that can't be put into that mode:\n{sites}",
    "leave these sites out, or pass allow_stuck=True to leave them as they are",
    raised=OverrideError,
)
EAGER_AVERAGE = Error(
    "CM137",
    "Dynamo leaves {kind} modules with momentum=None to eager mode while they train, where options can't reach",
    "set the flag, by train() or eval(); or compile and call the model within compile_modes.exportable(model)",
    where="owner {owner!r}",
    raised=OverrideError,
)
OVERRIDES_STUCK = Warn(
    "CM140",
    "overrides name sites that can't be put into that mode:\n{sites}",
    "leave these sites out",
)
DECIDED_IN_PYTHON = Warn(
    "CM141",
    "{modules} read their training flag in Python, where options can't reach: what depends on it stays as the flag "
    "says.",
    "set the flag, by train() or eval() of the module",
)
NOT_COMPILED = Warn(
    "CM142",
    "{modules} were in no graph that Dynamo compiled: if they ran, then in eager mode, where options can't reach and "
    "flags count.",
    "remove the graph break around them, which TORCH_LOGS=graph_breaks shows; or set their flags, by train() or eval()",
)
