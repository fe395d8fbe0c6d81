"""CM8xx: what may depend on mode and is no site, as explain() lists it below its table."""

from compile_modes.messages.entry import Remark

_BEFORE = "bind the program before run_decompositions()"
_BOTH = "export by compile_modes.export(model, args), which compares the two modes"

STAYS = Remark("CM801", "{owner}: its dropout is decomposed, and stays as it was exported", _BEFORE)
RNN_DECOMPOSED = Remark(
    "CM802",
    "{owner}: torch's decomposition of an RNN drops the dropout between its layers, if there was any",
    _BEFORE,
)
UNREAD = Remark(
    "CM803",
    "{owner}: its batch norm is not in the graph: it was not called, or its result was not used",
    "export in train mode, if it is called for its statistics",
)
ERASED = Remark(
    "CM804",
    "dropouts that the model may have had are erased from an eval graph; train() can't bring them back",
    "export in train mode",
)
ERASED_MODULES = Remark(
    "CM805",
    "dropouts that the model may have had are erased from an eval graph; train() can't bring them back (modules that "
    "left nothing behind: {modules})",
    "export in train mode",
)
LEFT_NOTHING = Remark(
    "CM806",
    "{modules} left nothing in the eval export; what they do in train, if anything, is lost",
    "export in train mode, or by compile_modes.export(model, args)",
)
NOT_CALLED = Remark(
    "CM810",
    "not called: train() of {kind}, which overrides nn.Module's",
    "after train(), call eval() on what that method keeps in eval; or export by compile_modes.export(model, args)",
)
MAY_BE_ONE = Remark(
    "CM811",
    "exported in eval: users of the input of {site} may stand as users of its result",
    "export in train mode, or by compile_modes.export(model, args)",
)
DRAWS = Remark("CM812", "in both modes: {op} draws random numbers (owner {owner!r})", _BOTH)
WRITES = Remark("CM813", "in both modes: {op} writes the buffer {path!r} (owner {owner!r})", _BOTH)
