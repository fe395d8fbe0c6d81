"""CM3xx: exporting both modes of an eager model."""

from compile_modes.errors import BindError, ExportError
from compile_modes.messages.entry import Error, Warn

NOT_EAGER = Error(
    "CM301",
    "{kind} is not an eager module",
    "pass the model itself; bind() gives modes to a program that was exported already",
    raised=ExportError,
)
STATE_CHANGES = Error(
    "CM302",
    "the state of the model changes with its mode, but its two programs share it",
    "undo what its train() does to parameters and buffers (a merge of weights, say) before export",
    where="{kind}",
    raised=ExportError,
)
EXPORT_FAILED = Error(
    "CM303",
    "the {mode} export failed: {error}",
    "make torch.export.export(model.{mode}(), args) work",
    where="{kind}",
    raised=ExportError,
)
LOST_REGION = Error(
    "CM304",
    "torch.export has lost a region: {node} would run with gradients {ours}, which eager has {eager}",
    "move the no_grad() or enable_grad() out of the regions around it",
    where="{node} (owner {owner!r})",
    raised=ExportError,
)
ASSIGNED = Error(
    "CM305",
    "forward() assigns a buffer what can't be written into it: {why}",
    "write it in place: with torch.no_grad(): self.buffer.copy_(value)",
    where="buffer {buffer!r}",
    raised=ExportError,
)
GUESSED = Warn(
    "CM306",
    "what Python decides in {modules} is taken to follow their own mode, which is a guess: it may follow that of a "
    "module around them.",
    "compile_modes.export(model, args) without probe=False: a few more exports tell",
)
FOLLOWS_ROOT = Warn(
    "CM307",
    "what Python decides by the mode of {module!r} follows the root here, which is in {mode} mode: only ops follow the "
    "mode of this submodule.",
    "put the whole module into that mode; compile_modes.explain() says why the two programs are not one",
)
NO_SECOND_PROGRAM = Error(
    "CM308",
    "{kind} is no ExportedProgram",
    "pass the programs of both modes",
    where="{argument}",
    raised=BindError,
)
KEEP_OF_TWO = Error(
    "CM309",
    "two programs say what keep and dropout_p are for",
    "leave them out",
    raised=BindError,
)
OTHER_WEIGHTS = Error(
    "CM310",
    "the two programs have other values under one name",
    "export both from one model, with no step of training between",
    where="{name}",
    raised=BindError,
)
