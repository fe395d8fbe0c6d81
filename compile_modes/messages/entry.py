"""How an entry of the catalogue becomes an error, a warning, or a reason."""

import contextlib
import os
import re
import string
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from compile_modes.errors import CompileModesError, ModeWarning, text_of

_E = TypeVar("_E", bound=CompileModesError)

# All entries by code. Filled when the files of the catalogue are imported.
CATALOGUE: dict[str, "Message"] = {}
# What warn_once() has said, and about what.
WARNED: set[Any] = set()

_CODE = re.compile(r"CM\d\d\d")
# Frames of these are passed over in the search for the user's line. contextlib stands between frames of torch.
_OURS = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (os.path.dirname(__file__), torch.__file__))
_BETWEEN = (contextlib.__file__, "<eval_with_key>")


@dataclass(frozen=True)
class Message(ABC):
    """One entry of the catalogue. Its texts are templates, filled by :meth:`str.format` with named fields.

    Attributes:
        code: ``CM`` and three digits, the first of which is the group.
        cause: what is wrong.
        where: the node, owner path, option or file that it is about; may be empty.
        remedy: what the user can do.
    """

    code: str
    cause: str
    remedy: str
    where: str = ""

    def __post_init__(self) -> None:
        if not _CODE.fullmatch(self.code):
            raise ValueError(f"{self.code!r} is no code")
        if self.code in CATALOGUE:
            raise ValueError(f"two messages have the code {self.code}")
        if not self.cause or not self.remedy:
            raise ValueError(f"{self.code} lacks a cause or a remedy")
        CATALOGUE[self.code] = self

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the entry is for: the name of an error type, "ModeWarning", "reason" or "remark"."""

    @property
    def fields(self) -> frozenset[str]:
        """The names that the templates use."""
        parts = [part for text in (self.cause, self.where, self.remedy) for part in string.Formatter().parse(text)]
        return frozenset(name for _, name, _, _ in parts if name is not None)

    def filled(self, fields: dict[str, Any]) -> tuple[str, str, str]:
        """Cause, where and remedy with the fields put in; raises TypeError unless these are exactly ``fields``."""
        if fields.keys() != self.fields:
            raise TypeError(f"{self.code} takes the fields {sorted(self.fields)}, not {sorted(fields)}")
        return self.cause.format(**fields), self.where.format(**fields), self.remedy.format(**fields)


@dataclass(frozen=True)
class Error(Message, Generic[_E]):
    """An entry that is raised, as an exception of type ``raised``."""

    raised: type[_E] = field(kw_only=True)

    @property
    def kind(self) -> str:
        """The name of the exception's type."""
        return self.raised.__name__

    def error(self, **fields: Any) -> _E:
        """The exception, to be raised by the caller."""
        cause, where, remedy = self.filled(fields)
        return self.raised(cause, where=where, remedy=remedy, code=self.code)


@dataclass(frozen=True)
class Warn(Message):
    """An entry that is warned of, as a ModeWarning."""

    @property
    def kind(self) -> str:
        """The name of the warning's category."""
        return ModeWarning.__name__

    def warning(self, **fields: Any) -> ModeWarning:
        """The warning, to be given by :func:`warn`, now or later."""
        return ModeWarning(text_of(*self.filled(fields), self.code), code=self.code)

    def warn(self, **fields: Any) -> None:
        """Warns, at the user's line."""
        warn(self.warning(**fields))

    def warn_once(self, *about: Any, **fields: Any) -> None:
        """As :meth:`warn`, unless this process has been warned so before, about the same things."""
        warn_once(self.warning(**fields), *about)


@dataclass(frozen=True)
class Reason(Message):
    """An entry that says why a site can't be put into a mode; shown within errors, warnings and :func:`explain`."""

    @property
    def kind(self) -> str:
        """That it is one."""
        return "reason"

    def reason(self, **fields: Any) -> str:
        """Code and cause. The remedy stands in the catalogue only, for there are many reasons to a message."""
        return f"{self.code}: {self.filled(fields)[0]}"


@dataclass(frozen=True)
class Remark(Reason):
    """An entry that says what may depend on mode and is no site; shown below the table of :func:`explain`."""

    @property
    def kind(self) -> str:
        """That it is one."""
        return "remark"


def warn(warning: ModeWarning) -> None:
    """Gives a warning at the user's line: the first above that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _passed_over(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)


class Place:
    """A line of the user's, to warn at later, from another thread."""

    def __init__(self, file: str, line: int) -> None:
        self.file, self.line = file, line

    @classmethod
    def of_caller(cls) -> "Place":
        """The line that runs: the first above that is neither this package's nor torch's."""
        frame = sys._getframe()
        while frame.f_back is not None and _passed_over(frame.f_code.co_filename):
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno)

    def warn(self, warning: ModeWarning) -> None:
        """Gives a warning there."""
        warnings.warn_explicit(warning, type(warning), self.file, self.line)


def warn_once(warning: ModeWarning, *about: Any) -> None:
    """Gives a warning that this process has not seen before, or not about the same things."""
    key = (str(warning), *about)
    if key not in WARNED:
        WARNED.add(key)
        warn(warning)


def _passed_over(file: str) -> bool:
    return os.path.abspath(file).startswith(_OURS) or file.startswith(_BETWEEN)


def parted(reason: str) -> tuple[str, str]:
    """The code and the text of a reason; no code if it has none."""
    code, colon, text = reason.partition(": ")
    return (code, text) if colon and _CODE.fullmatch(code) else ("", reason)
