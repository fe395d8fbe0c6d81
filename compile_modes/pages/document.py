"""A page, or a fragment for notebooks, around what was drawn."""

import base64
import functools
import hashlib
import os
from importlib import resources
from typing import Any

from compile_modes import messages
from compile_modes.files import FileLike, label, replacing
from compile_modes.pages.drawing import codes_in, escape, linked, told

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body class="cm-modes cm-page">
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A page that can be searched and filtered. No script runs in it but its own, and it loads nothing.

    Args:
        title: its heading, plain text.
        body: HTML, as :func:`explanation` and :func:`difference` draw it.
    """
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _PAGE.format(title=escape(title), body=body, style=_file("style.css"), script=script, digest=digest)


def fragment(body: str, title: str = "") -> str:
    """The same for the output of a notebook's cell: without scripts, in the colours of the notebook."""
    head = f"<b>{escape(title)}</b>" if title else ""
    return f'<div class="cm-modes"><style>{_file("style.css")}</style>{head}{body}</div>'


def report(text: str) -> str:
    """The text of a report as a fragment, with what its codes mean."""
    return fragment(f"<pre>{linked(text)}</pre>{told(codes_in([text]))}")


def write(page: str, file: FileLike) -> None:
    """Writes a page; the file appears whole or not at all, in place of one that is there.

    Args:
        page: HTML.
        file: a path, or a stream of bytes.

    Raises:
        OptionError: ``file`` is neither.
        ArchiveError: it can't be written.
    """
    _check(file)
    try:
        with replacing(file) as stream:
            stream.write(page.encode("utf-8", "backslashreplace"))  # names may hold half a surrogate pair
    except OSError as error:
        raise messages.NOT_WRITTEN.error(error=error.strerror or error, file=label(file)) from error


def _check(file: Any) -> None:
    if (isinstance(file, str | os.PathLike) and os.fspath(file)) or _takes_bytes(file):
        return
    raise messages.NOT_A_PAGE.error(given=file)


def _takes_bytes(file: Any) -> bool:
    return callable(getattr(file, "write", None)) and not hasattr(file, "encoding")  # which streams of text have


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
