"""CM3xx: exporting both modes of an eager model."""

from compile_modes.errors import ExportError
from compile_modes.messages.entry import Error

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
