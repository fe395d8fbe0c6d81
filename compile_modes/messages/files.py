"""CM5xx: files that can't be read or written."""

from compile_modes.errors import ArchiveError, ExportedFile
from compile_modes.messages.entry import Error, Warn

_LOAD_EXPORTED = "load it by torch.export.load() and give the program to compile_modes.bind()"

IS_DIRECTORY = Error("CM501", "the path is a directory", "name a file in it", where="{file}", raised=ArchiveError)
NOT_A_FILE = Error(
    "CM502",
    "the path is not that of a regular file",
    "name another one",
    where="{file}",
    raised=ArchiveError,
)
NOT_WRITTEN = Error(
    "CM503",
    "the file can't be written: {error}",
    "see whether its folder is there and may be written to, and whether the disk is full",
    where="{file}",
    raised=ArchiveError,
)
NO_FILE = Error("CM504", "there is no such file", "check the path", where="{file}", raised=ArchiveError)
NO_PERMISSION = Error(
    "CM505",
    "the file can't be opened: permission denied",
    "ask for the right to read it",
    where="{file}",
    raised=ArchiveError,
)
DAMAGED = Error(
    "CM506",
    "the file is cut off or damaged ({reason})",
    "get another copy, or save it again",
    where="{file}",
    raised=ArchiveError,
)
# Those without a place get it from container.reading(), which knows the file.
EMPTY = Error("CM507", "the file is empty", "get another copy, or save it again", raised=ArchiveError)
IS_PICKLE = Error(
    "CM508",
    "the file is a pickle, not an archive",
    "torch.load() reads what torch.save() wrote",
    raised=ArchiveError,
)
NO_ARCHIVE = Error("CM509", "the file is no .pt2 archive", "pass what save() has written", raised=ArchiveError)
COMPRESSED = Error(
    "CM510",
    "some of its records are compressed or encrypted, which those of .pt2 files never are",
    "pass what save() has written, not packed again",
    raised=ArchiveError,
)
OTHER_BYTE_ORDER = Error(
    "CM511",
    "the file was written on a machine of the other byte order",
    "save it again on a machine like this one",
    raised=ArchiveError,
)
IS_EXPORTED = Error(
    "CM512",
    "the file was written by torch.export.save(), not by compile_modes",
    _LOAD_EXPORTED,
    raised=ExportedFile,
)
NO_PROGRAM = Error(
    "CM513",
    "the .pt2 archive holds no exported program",
    "export and save a program",
    raised=ArchiveError,
)
IS_OLD = Error(
    "CM514",
    "the file was written by torch.export.save() of torch 2.7 or older",
    _LOAD_EXPORTED,
    raised=ArchiveError,
)
IS_TORCHSCRIPT = Error("CM515", "the file is a TorchScript archive", "torch.jit.load() reads it", raised=ArchiveError)
IS_TORCH_SAVE = Error("CM516", "the file was written by torch.save()", "torch.load() reads it", raised=ArchiveError)
OTHER_ZIP = Error(
    "CM517",
    "the file is a zip, but no .pt2 archive",
    "pass what save() has written",
    raised=ArchiveError,
)
NEWER_FORMAT = Error(
    "CM518",
    "the file has format {format}, written with torch {torch}; the newest known is {newest}",
    "upgrade compile_modes",
    raised=ArchiveError,
)
UNKNOWN_OPERATORS = Error(
    "CM519",
    "program {name!r} uses operators that this process doesn't know: {operators}",
    "import what registers them before reading the file",
    where="{file}",
    raised=ArchiveError,
)
NOT_LOADABLE = Error(
    "CM520",
    "torch {torch} can't load program {name!r}, written with torch {writer}: {error}",
    "import what registers its custom types; or load it with the torch that wrote it",
    where="{file}",
    raised=ArchiveError,
)
HOLDS_PICKLE = Error(
    "CM521",
    "the file holds a pickled Python object, which is not read",
    "save a program whose constants are tensors",
    where="{name}",
    raised=ArchiveError,
)
UNKNOWN_CLASS = Error(
    "CM522",
    "the value can't be read, or not without running code that the file names: {error}",
    "import the package that defines its class, or call torch.serialization.add_safe_globals() first",
    where="{name}",
    raised=ArchiveError,
)
OTHER_WRITER = Error(
    "CM523",
    "the programs in the file were not written by save()",
    "read them by torch.export.load() and bind them",
    where="{file}",
    raised=ArchiveError,
)
NOT_A_PROGRAM = Error(
    "CM530",
    "{name!r}: {kind} is not a named ExportedProgram",
    "name each program in letters, digits and underscores",
    where="{file}",
    raised=ArchiveError,
)
NO_PROGRAMS = Error("CM531", "there is no program to write", "pass at least one", where="{file}", raised=ArchiveError)
NOTES_NOT_JSON = Error(
    "CM532",
    "the notes can't be written as JSON: {error}",
    "use numbers that are finite, strings, lists and dicts",
    where="notes",
    raised=ArchiveError,
)
NOTES_CHANGE = Error(
    "CM533",
    "the notes would come back changed",
    "use lists instead of tuples, and strings as keys of dicts",
    where="notes",
    raised=ArchiveError,
)
NOT_SERIALIZED = Error(
    "CM534",
    "torch can't serialize the program: {error}",
    "torch.export.save() must be able to write it",
    where="{where}",
    raised=ArchiveError,
)
NOT_STORED = Error(
    "CM535",
    "the value can't be stored: {error}",
    "give it the device and the class of the one that the program holds",
    where="state[{name!r}]",
    raised=ArchiveError,
)
TIES_DISAGREE = Error(
    "CM536",
    "the value shares its storage with another one, and the two disagree",
    "tied weights need equal values",
    where="state[{name!r}]",
    raised=ArchiveError,
)
PICKLED_CONSTANT = Error(
    "CM537",
    "a constant is a {kind}, which could only be pickled",
    "only tensors and TorchBind objects can be stored",
    where="{name}",
    raised=ArchiveError,
)
NO_SUCH_STATE = Error(
    "CM538",
    "no program has such a value",
    "pass values of parameters and buffers of the programs",
    where="{names}",
    raised=ArchiveError,
)
NOT_A_TENSOR = Error(
    "CM539",
    "the value is a {kind}, not a tensor",
    "pass a tensor",
    where="{where}",
    raised=ArchiveError,
)
NO_VALUES = Error(
    "CM540",
    "the tensor is fake, or on the meta device, and has no values",
    "export with real weights",
    where="{where}",
    raised=ArchiveError,
)
OTHER_KIND = Error(
    "CM541",
    "the program holds a {before}, the new value is a {now}",
    "export again after changing classes, dtypes or shapes",
    where="state[{name!r}]",
    raised=ArchiveError,
)
NO_RECORD_FOR = Error(
    "CM542",
    "torch's archives can't hold a {kind}",
    "make it a dense tensor of one of torch's own dtypes before export",
    where="{name}",
    raised=ArchiveError,
)
NOT_PICKLED = Error(
    "CM543",
    "torch.save() can't write a {kind}: {error}",
    "torch.save() must be able to write it",
    where="{name}",
    raised=ArchiveError,
)
NOT_SAVABLE = Error(
    "CM544",
    "{kind} was not made from an ExportedProgram by bind(), nor by export()",
    "bind the ExportedProgram itself, not its module(), and save the result",
    where="{file}",
    raised=ArchiveError,
)
EDITED_SINCE = Error(
    "CM545",
    "the module's graph was edited after it was bound",
    "save before bake() or other tools edit the graph",
    where="{file}",
    raised=ArchiveError,
)
NOT_READ_BACK = Error(
    "CM546",
    "torch could not read the program back, so nothing was written: {error}",
    "torch.export.load() can't read what torch.export.save() makes of it either: report it to torch",
    where="{where}",
    raised=ArchiveError,
)
EXAMPLES_LEFT_OUT = Warn(
    "CM560",
    "the example inputs of program {name!r} were left out: {error}",
    "nothing, unless the program is to be exported again: then pass inputs",
)
