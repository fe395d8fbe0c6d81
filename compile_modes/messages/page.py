"""The page of all entries, in markdown."""

import string
from collections.abc import Iterator

from compile_modes.errors import text_of
from compile_modes.messages import CATALOGUE
from compile_modes.messages.entry import Message, Reason

_GROUPS = {
    "0": "Packages",
    "1": "What was asked for",
    "2": "Binding and baking",
    "3": "Exporting both modes",
    "4": "Under torch.compile",
    "5": "Files",
    "6": "Warming up",
    "7": "Reasons: why a site can't be put into a mode",
    "8": "Remarks: what may depend on mode and is no site",
    "9": "The command line and its tables; trainers",
}
_HEAD = """\
# Errors, warnings and reasons

Everything that compile_modes says begins with a code, which stays the same from release to release. Errors have it as
`.code`, beside `.cause`, `.where` and `.remedy`; warnings have `.code`. One kind of warning is turned off by its code:

    warnings.filterwarnings("ignore", message="CM230", category=compile_modes.ModeWarning)

What stands in `<angle brackets>` is filled in.
"""


def markdown() -> str:
    """The catalogue: a section for each group, and in it one for each code, with its kind and what it says."""
    lines, group = [_HEAD], ""
    for code, entry in sorted(CATALOGUE.items()):
        if code[2] != group:
            group = code[2]
            lines.append(f"## {_GROUPS[group]} (CM{group}xx)\n")
        lines += _section(entry)
    return "\n".join(lines)


def _section(entry: Message) -> Iterator[str]:
    yield f"### {entry.code}\n"
    shown = isinstance(entry, Reason)  # whose remedy is not shown with it
    cause, where, remedy = (with_names(text) for text in (entry.cause, entry.where, entry.remedy))
    yield f"{entry.kind}\n"
    yield f"```text\n{text_of(cause, where, '' if shown else remedy, entry.code)}\n```\n"
    if shown:
        yield f"What to do: {remedy}\n"


def with_names(template: str) -> str:
    """A template with the names of its fields in the place of values."""
    parts = string.Formatter().parse(template)
    return "".join(text + (f"<{name.replace('_', ' ')}>" if name is not None else "") for text, name, _, _ in parts)
