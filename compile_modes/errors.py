"""What this package raises and warns with: each message says what was wrong, where, and what to do.

The types only; what they say stands in ``messages/``, each message under a code.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from compile_modes._compat import ShortenTraceback

_E = TypeVar("_E", bound="CompileModesError")
_FEW = 5


class CompileModesError(ShortenTraceback):
    """Base of all errors of this package.

    Derives from the one Dynamo exception that backends may raise without being wrapped into
    ``BackendCompilerFailed``, so that ``except CompileModesError`` also works around a compiled call.

    Args:
        cause: what was wrong, one sentence.
        where: the node, owner path, option or file that it is about.
        remedy: what the caller can do.
        code: the entry of the catalogue, ``CM103`` say; the text begins with it.
    """

    def __init__(self, cause: str, *, where: str = "", remedy: str = "", code: str = "") -> None:
        self.cause, self.where, self.remedy, self.code = cause, where, remedy, code
        super().__init__(text_of(cause, where, remedy, code), first_useful_frame=None)

    @property
    def headline(self) -> str:
        """Code and cause, to be quoted within another message."""
        return text_of(self.cause, "", "", self.code)

    def at(self: _E, where: str) -> _E:
        """The same error, about another place."""
        return type(self)(self.cause, where=where, remedy=self.remedy, code=self.code)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; those of torch go on for pages."""
    return str(error).strip().partition("\n")[0]


def summary(error: BaseException) -> str:
    """The type of an exception, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def few(names: Iterable[str]) -> str:
    """The first five of some names, with commas between them, and a sign that there are more."""
    names = list(names)
    return ", ".join(names[:_FEW]) + (", ..." if names[_FEW:] else "")


def few_lines(lines: Iterable[str]) -> str:
    """The first five of some lines, and where all are shown."""
    lines = list(lines)
    more = [f"  and {len(lines) - _FEW} more, see compile_modes.explain()"] if lines[_FEW:] else []
    return "\n".join(lines[:_FEW] + more)


def text_of(cause: str, where: str, remedy: str, code: str) -> str:
    """A message as it is shown; what is empty is left out."""
    lines = [f"{code}: {cause}" if code else cause]
    if where:
        lines.append(f"  where: {where}")
    if remedy:
        lines.append(f"  what to do: {remedy}")
    return "\n".join(lines)


class BindError(CompileModesError):
    """The object cannot be bound or baked; it is left as it was."""


class ExportError(CompileModesError):
    """A model cannot be exported in one of its modes, or its two exports cannot share their state."""


class OptionError(CompileModesError):
    """A backend option, a mode or a pattern is not usable."""


class OverrideError(CompileModesError):
    """An explicit request for a mode matches no site, or a site that cannot be put into that mode."""


class CallError(CompileModesError, TypeError):
    """A call of a module with modes has other arguments than the program was exported with."""


class CaptureError(CompileModesError):
    """The Dynamo graph could not be retraced to a pre-autograd ATen graph."""


class ArchiveError(CompileModesError):
    """A file can't be written or read; nothing is left of a file that could not be written whole."""


class ExportedFile(ArchiveError):
    """The file is what torch.export.load() reads."""


class PackageError(CompileModesError):
    """A module can't be packaged as it is asked, or a packaged one can't do what its state or its flags ask for."""


class TuningError(CompileModesError):
    """A module can't be fine-tuned as it is asked; it is left as it was."""


class WarmupError(CompileModesError):
    """A module can't be warmed up, or a call of it has failed on the way; its state is as it was."""


class SampleError(CompileModesError):
    """A module can't be sampled from as it is asked; it is as it was."""


class MissingLibraryError(CompileModesError, ImportError):
    """A library is missing that was asked for by what works with it."""


class VerifyError(CompileModesError):
    """A module does not do what its eager model does, or the two can't be compared.

    Attributes:
        report: the :class:`compile_modes.VerifyReport` of the comparison; None if there was none.
    """

    report: Any = None


class ModeWarning(UserWarning):
    """Something mode-dependent stays as it is, a graph reaches Inductor without our stage, or a file is read in part.

    Args:
        text: what is shown; it begins with the code, so that ``warnings.filterwarnings`` can choose by it.
        code: the entry of the catalogue, ``CM230`` say.
    """

    def __init__(self, text: str, *, code: str = "") -> None:
        super().__init__(text)
        self.code = code
