"""What the pages need beside Markdown: loaded by mkdocs as a hook, and by mkdocstrings as an extension of griffe."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`([^`]+)`")
MARKED_FENCE = re.compile(r"^```python slow$", re.MULTILINE)  # tests/test_docs.py reads the mark
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leaves out marks of code blocks, and links to files that are no pages."""
    return OUTSIDE.sub(r"\1", MARKED_FENCE.sub("```python", markdown))


class Roles(griffe.Extension):
    """Turns roles in docstrings (``:func:`name```) into links of mkdocstrings, or into code where there is no page."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)


def link(role: re.Match[str]) -> str:
    """``compile_modes.bind`` becomes a link with that text; names without a path are those of the same module."""
    name = role[1]
    return f"[`{name}`][{name}]" if name.startswith("compile_modes.") else f"`{name}`"
