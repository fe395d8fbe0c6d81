"""CM9xx: the command line, and the tables that it and explain() draw."""

from compile_modes.errors import ArchiveError, BindError, CompileModesError, OptionError, PackageError
from compile_modes.messages.entry import Error

NO_RICH = Error("CM901", "tables need rich, which is not installed", "pip install rich", raised=CompileModesError)
NOT_IMPORTED = Error(
    "CM902",
    "the module can't be imported: {error}",
    "install it, or put its folder on PYTHONPATH",
    where="--import {name}",
    raised=OptionError,
)
PROGRAM_DAMAGED = Error(
    "CM910",
    "the file is damaged: {damage}",
    "get another copy, or save it again",
    where="{file}",
    raised=ArchiveError,
)
PROGRAM_NOT_LOADABLE = Error(
    "CM911",
    "torch {torch} can't load the program: {error}",
    "import what registers its operators and types (--import), or use the torch that wrote it; a program with a region "
    "that returns nothing can't be read from what torch.export.save() writes: use compile_modes.save()",
    where="{file}",
    raised=ArchiveError,
)
SEVERAL_PROGRAMS = Error(
    "CM912",
    "the file holds the programs {names}",
    "save one by torch.export.save()",
    where="{file}",
    raised=ArchiveError,
)
EXISTS = Error("CM913", "the file exists", "name another one, or use --force", where="{file}", raised=ArchiveError)
NO_EXAMPLES = Error(
    "CM914",
    "the file has no example arguments",
    "call compile_modes.package() with arguments",
    where="{file}",
    raised=PackageError,
)
NO_SUCH_LOSS = Error(
    "CM915",
    "there is no such function: {error}",
    "pass --loss module:function, with the module on PYTHONPATH",
    where="{name}",
    raised=OptionError,
)
NOT_COMPARABLE = Error(
    "CM916",
    "{kind} holds no graph to compare",
    "{remedy}",
    where="{where}",
    raised=BindError,
)
NOT_A_PAGE = Error(
    "CM917",
    "html={given!r} is no file to write to",
    "pass a path, such as 'modes.html', or a file that is open for bytes",
    raised=OptionError,
)
