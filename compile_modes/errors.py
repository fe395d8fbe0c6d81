"""What this package raises and warns with: each message says what was wrong, where, and what to do."""

from compile_modes._compat import ShortenTraceback


class CompileModesError(ShortenTraceback):
    """Base of all errors of this package.

    Derives from the one Dynamo exception that backends may raise without being wrapped into
    ``BackendCompilerFailed``, so that ``except CompileModesError`` also works around a compiled call.

    Args:
        cause: what was wrong, one sentence.
        where: the node, owner path, option or file that it is about.
        remedy: what the caller can do.
    """

    def __init__(self, cause: str, *, where: str = "", remedy: str = "") -> None:
        self.cause, self.where, self.remedy = cause, where, remedy
        lines = [cause]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  what to do: {remedy}")
        super().__init__("\n".join(lines), first_useful_frame=None)


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


class WarmupError(CompileModesError):
    """A module can't be warmed up, or a call of it has failed on the way; its state is as it was."""


class ModeWarning(UserWarning):
    """Something mode-dependent stays as it is, or a graph reaches Inductor without our stage."""
