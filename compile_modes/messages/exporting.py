"""CM3xx: exporting both modes of an eager model."""

from compile_modes.errors import BindError, ExportError, OptionError, VerifyError
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
    where="{where}",
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
    where="{where}",
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
NOT_EQUAL = Error(
    "CM311",
    "{kind} is not what the model is:\n{report}",
    "compile_modes.explain() says which flag each op follows; a program of compile_modes.export(model, args) is exact",
    where="{where}",
    raised=VerifyError,
)
OTHER_PARAMETERS = Error(
    "CM312",
    "the parameters of the two have other names",
    "pass the model that the module was made from",
    where="{names}",
    raised=VerifyError,
)
ONE_MODULE = Error(
    "CM313",
    "the two are one {kind}, which nothing is compared by",
    "pass what was made from the model first, and the model second",
    raised=VerifyError,
)
CROSSED = Error(
    "CM314",
    "{ours!r} of the module is {theirs!r} of the model: one can't be put back without the other",
    "pass the model that the module was made from, or a copy",
    where="{ours}",
    raised=VerifyError,
)
NOT_ITS_ARGUMENTS = Error(
    "CM315",
    "the model can't be called so: {error}",
    "pass the arguments of a call: verify(ours, model, *args, kwargs={{...}})",
    where="{kind}",
    raised=VerifyError,
)
MODEL_FAILS = Error(
    "CM316",
    "the eager model itself fails in {mode} mode: {error}",
    "pass arguments that it can be called with in both modes",
    where="{kind}",
    raised=VerifyError,
)
NOTHING_COMPARED = Error(
    "CM317",
    "nothing could be compared:\n{left_out}",
    "as said there",
    raised=VerifyError,
)
NO_MODES = Error(
    "CM318",
    "the module has no modes: {error}",
    "bind() it first",
    where="{kind}",
    raised=VerifyError,
)
NOT_A_COUNT = Error(
    "CM319",
    "{argument} is {value!r}",
    "pass a whole number, at least {least}",
    where="{argument}",
    raised=OptionError,
)
NOT_VERIFIED = Warn(
    "CM320",
    "the module could not be compared with the model: {error}",
    "compile_modes.export(model, args, verify=False), which does not try; or verify() with other arguments",
)
EXPORT_NOT_EQUAL = Error(
    "CM321",
    "the exported module is not what the model is:\n{report}",
    "export it with verify=False if those modes are not needed; or let the model decide by modes of its own",
    where="{where}",
    raised=VerifyError,
)
NAME_OF_TORCH = Error(
    "CM322",
    "torch.export can't keep the {kind} {name!r} of the model: modules that it makes have an attribute of that name",
    "rename it, or export the model within another one: names in submodules are free",
    where="{kind} {name!r}",
    raised=ExportError,
)
DRAWN_IN_PYTHON = Error(
    "CM323",
    "the {mode} export of the model drew random numbers from {generators}, which the program would repeat in each call",
    "draw them from torch: torch.rand(()) in the place of random.random(), and torch.where, torch.cond or a mask where "
    "Python branches on them",
    where="{kind}",
    raised=ExportError,
)
LOST_BACKWARD = Error(
    "CM324",
    "torch.export keeps what the autograd.Function {function!r} computes, and drops its backward",
    "write it with detach(), as in x + (x.sign() - x).detach(); or as a torch.library.custom_op with register_autograd",
    where="{node} (owner {owner!r})",
    raised=ExportError,
)
KEPT_BY_TRAIN = Warn(
    "CM325",
    "train() and eval() of {kind} leave {modules} in one mode, and so does the exported module, whatever their flags.",
    "export a model with a plain train(), if they are to have modes, and put them into eval after train()",
)
SWAPPED = Error(
    "CM326",
    "the program for evaluation has ops in train mode, and the other one has none",
    "bind(train_program, evaluation=eval_program)",
    raised=BindError,
)
ONE_PROGRAM_TWICE = Error(
    "CM327",
    "both programs are the same one, so that nothing is known of the other mode",
    "bind(train_program, evaluation=eval_program); or bind(program), if there is no other",
    raised=BindError,
)
INFERENCE_PARAMETERS = Error(
    "CM328",
    "the parameters {names} are inference tensors, which can be neither trained nor traced",
    "build the model, and load its weights, outside of inference_mode()",
    where="{kind}",
    raised=ExportError,
)
LOST_CALL = Error(
    "CM329",
    "torch.export drops {what}, so that the program would do something else",
    "leave it to the code that calls the model",
    raised=ExportError,
)
