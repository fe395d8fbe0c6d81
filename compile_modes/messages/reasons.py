"""CM7xx: why a site can't be put into a mode, as tables, errors and warnings quote it."""

from compile_modes.messages.entry import Reason

_IN_TRAIN = "export in train mode, or by compile_modes.export(model, args)"
_BEFORE = "bind the program before run_decompositions()"
_BY_FLAG = "set the flag, by train() or eval() of the module, instead of an option"

KERNEL = Reason(
    "CM701",
    "a kernel below training IR: its extra inputs and outputs depend on the mode",
    _BEFORE,
)
BACKWARD = Reason(
    "CM702",
    "a backward kernel: it follows from the forward when autograd is derived",
    "export the forward alone, and let autograd derive the backward",
)
DECOMPOSED = Reason(
    "CM703",
    "decomposed: the mode is spread over several nodes; bind() puts it together again where it can",
    _BEFORE,
)
LOST_DROPOUT = Reason(
    "CM704",
    "no dropout on the attention weights: the module had none, or it was traced in eval mode and its p is lost",
    f"{_IN_TRAIN}; or pass dropout_p={{{{owner: p}}}}",
)
LOST_ITERATION = Reason("CM705", "spectral norm's power iteration is not in an eval export", _IN_TRAIN)
STUCK_ITERATION = Reason(
    "CM706",
    "spectral norm's power iteration is not in a no_grad region of its own here, and can't be taken out",
    "export by compile_modes.export(model, args)",
)
FUSED = Reason(
    "CM707",
    "a fused kernel of inference, to which torch's attention goes in eval without gradients: its dropout is lost",
    f"call torch.backends.mha.set_fastpath_enabled(False) first; or {_IN_TRAIN}",
)
UNTRACKED = Reason(
    "CM708",
    "track_running_stats was turned off later: eval uses running statistics, which are not in a train export",
    "export in eval mode, or by compile_modes.export(model, args)",
)
QUANTIZED = Reason("CM709", "a quantized RNN runs inference only", "train the module before it is quantized")
KEPT_CALL = Reason("CM710", "it is in a part of the graph that is kept as Dynamo recorded it", _BY_FLAG)
HIDDEN_CALL = Reason("CM711", "it is inside a function that the graph does not show", _BY_FLAG)
COMPUTED = Reason(
    "CM712",
    "its {argument} is computed in the graph",
    "change what computes it, or write the flag of the module in its place",
)
LACKS_P = Reason(
    "CM713",
    "{argument} is 0: the op had none, or it was traced in eval mode and its p is lost",
    f"{_IN_TRAIN}; or pass dropout_p={{{{owner: p}}}}",
)
CUMULATIVE = Reason(
    "CM714",
    "momentum 0.0 in an eval graph: a cumulative average looks the same; export under exportable(model)",
    "export under compile_modes.exportable(model)",
)
RUNS_OFTEN = Reason(
    "CM715",
    "it would write its statistics inside a branch, a loop or a nested compile region",
    _IN_TRAIN,
)
OUT_OF_REACH = Reason(
    "CM716",
    "{counter} is out of the graph's reach, so train could not advance it",
    "bind the ExportedProgram instead of its module; under torch.compile, switch the module to train",
)
OUT_OF_PASS = Reason(
    "CM717",
    '{why};\n    switch the module to train, or use the backend "pt2e_modes"',
    'switch the module to train, or use the backend "pt2e_modes"',
)
NOT_RECOMPOSED = Reason("CM720", "decomposed, and {why}", _BEFORE)
