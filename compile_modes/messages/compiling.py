"""CM4xx: under torch.compile, by the backend or as a pass of Inductor."""

from compile_modes.errors import CaptureError
from compile_modes.messages.entry import Error, Warn

NOT_RETRACED = Error(
    "CM401",
    "the graph could not be retraced before autograd: {error}",
    "without overrides the graph compiles as stock Inductor compiles it",
    where="{node}",
    raised=CaptureError,
)
SHARED_GRAPH = Error(
    "CM402",
    "{call} runs one graph for several modules, and which of them can't be told",
    "mark a method of the module as nested_compile_region, or leave training and overrides out",
    where="{modules}",
    raised=CaptureError,
)
UNKNOWN_INPUTS = Error(
    "CM403",
    "nothing is known of the inputs of the graph",
    "compile it with torch.compile",
    raised=CaptureError,
)
UNBOUND = Warn(
    "CM410",
    "an exported module with {count} mode-dependent sites is compiled as it was exported: train() and eval() do not "
    "reach them.",
    "call compile_modes.bind(module) before torch.compile",
)
AS_IT_CAME = Warn(
    "CM411",
    "pt2e_modes hands a graph to Inductor as it came.\n{error}",
    "nothing, where the flags of the modules are all that decides: it compiles as stock Inductor compiles it",
    where="{where}",
)
INDUCTOR_FAILED = Warn(
    "CM412",
    "pt2e_modes hands a graph to Inductor as it came: {error}",
    "nothing, where the flags of the modules are all that decides: it compiles as stock Inductor compiles it",
)
PART_AS_IT_CAME = Warn(
    "CM413",
    "pt2e_modes hands a part of a graph to Inductor as it came, in the modes that its modules are in. Overrides would "
    "not reach {sites}",
    "nothing, unless options are to decide: set the flags, by train() or eval() of the modules",
)
PASS_LEAVES_GRAPH = Warn(
    "CM414",
    "ModePass leaves a graph as it came.\n{error}",
    "nothing, where the flags of the modules are all that decides: it compiles as stock Inductor compiles it",
    where="{where}",
)
RNN_DROPOUT_LOST = Warn(
    "CM415",
    "{op} (owner {owner!r}) is compiled without its dropout between layers: torch's decomposition loses it "
    "(_decomp/decompositions.py).",
    "run this module in eager mode to train with it",
)
CACHE_FULL = Warn(
    "CM416",
    "{function} is now compiled for {count} combinations of modes, and Dynamo has no room for more:\n"
    "the next new one runs in eager mode, or raises if fullgraph=True.",
    'raise torch._dynamo.config.recompile_limit ({limit}), or pass options={{"mode_vectors": N}},\n'
    "  which keeps the N combinations that were used last, and compiles others again",
)
COMPILED_TOO_OFTEN = Warn(
    "CM417",
    "{function} has been compiled {count} times, and Dynamo compiles no function more often:\n"
    "new combinations of modes run in eager mode.",
    "raise the option mode_vectors or torch._dynamo.config.accumulated_recompile_limit",
)
NOT_FROZEN = Warn(
    "CM418",
    "a graph runs in its stock form, although options ask for freeze: {error}",
    "nothing: its results are right, and its speed is that without the option",
)
STAYS_GUARDED = Warn(
    "CM419",
    'options={{"modes": "data"}}: another graph is compiled for each mode of\n{sites}',
    "nothing, if these are seldom flipped",
)
