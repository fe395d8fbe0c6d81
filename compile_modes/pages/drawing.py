"""Pieces of HTML. Each function escapes the text that it is given and returns HTML."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compile_modes import messages
from compile_modes.messages.page import with_names

_CODE = re.compile(r"\bCM\d{3}\b")
# The kinds of pills, which style.css colours.
_MODES = {"train": "train", "eval": "eval", None: "both"}


def escape(text: Any) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text), quote=True)


def shown(value: Any) -> str:
    """A value of a report, as plain text."""
    return "none" if value is None else str(value)


def counted(number: int, things: str) -> str:
    """How many there are of what its plural names, as plain text."""
    return f"{number} {things if number != 1 else things.removesuffix('s')}"


def mode_pill(mode: str | None, modeless: bool = False) -> str:
    """A mode in its colour."""
    text = mode or ("same in both" if modeless else "computed")
    return f'<span class="pill {_MODES.get(mode, "both")}">{escape(text)}</span>'


def pill(text: Any, kind: str) -> str:
    """A short text in the colour of a kind, which is a class of style.css."""
    return f'<span class="pill {kind}">{escape(text)}</span>'


def row(data: Mapping[str, str], *cells: str) -> str:
    """An item of a list that search and filters find: by its text, and by its data.

    Args:
        data: the values of ``data-<fact>``, by the name of the fact: plain text.
        cells: HTML.
    """
    said = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return f'<li class="site"{said}>{"".join(cells)}</li>'


def named(name: str) -> str:
    """The name of a module in front of its only site; empty if there is none."""
    return f'<code class="module">{escape(name)}</code>' if name else ""


def linked(text: str) -> str:
    """Text whose codes lead to what the page says of them."""
    parts = _CODE.split(text)
    codes = _CODE.findall(text)
    links = [f'<a href="#{code}">{code}</a>' if code in messages.CATALOGUE else code for code in codes]
    return "".join(escape(part) + link for part, link in zip(parts, [*links, ""], strict=True))


def codes_in(texts: Iterable[str]) -> set[str]:
    """The codes of the catalogue that some texts name."""
    return {code for text in texts for code in _CODE.findall(text)} & messages.CATALOGUE.keys()


def chips(groups: Mapping[str, Mapping[str, int]]) -> str:
    """Buttons that filter: for each kind of fact, its values and how many there are.

    Args:
        groups: the number of items by value, by the name of the fact; the items have the value as ``data-<fact>``.
    """
    drawn = []
    for fact, counts in groups.items():
        buttons = "".join(
            f'<button type="button" class="chip" data-fact="{escape(fact)}" data-value="{escape(value)}" '
            f'aria-pressed="false">{escape(value)} <b>{count}</b></button>'
            for value, count in counts.items()
            if count
        )
        drawn.append(
            f'<div class="group" role="group" aria-label="{escape(fact)}"><i>{escape(fact)}</i>{buttons}</div>'
        )
    return "".join(drawn)


def controls(groups: Mapping[str, Mapping[str, int]], what: str, trees: bool) -> str:
    """The bar by which a page is searched and filtered; fragments, which have no script, don't show it."""
    folding = '<button type="button" data-fold="open">open all</button>' if trees else ""
    folding += '<button type="button" data-fold="close">close all</button>' if trees else ""
    return (
        f'<div class="controls"><div class="line"><input type="search" placeholder="search: name, op, value (press /)" '
        f'aria-label="search"><button type="button" data-reset>show all</button>{folding}'
        f'<output aria-live="polite" data-what="{escape(what)}"></output></div>{chips(groups)}</div>'
    )


def bar(parts: Mapping[str, tuple[int, str]]) -> str:
    """A bar of parts, each as wide as its number is large, with a legend.

    Args:
        parts: by their names, the number and the kind, which is a class of style.css.
    """
    filled = {name: part for name, part in parts.items() if part[0]}
    pieces = "".join(f'<span class="{kind}" style="flex-grow:{n}"></span>' for n, kind in filled.values())
    legend = "".join(
        f'<li><span class="dot {k}"></span><b>{n}</b> {escape(name)}</li>' for name, (n, k) in parts.items()
    )
    return f'<div class="bar" aria-hidden="true">{pieces}</div><ul class="legend">{legend}</ul>'


def listed(title: str, texts: Sequence[str]) -> str:
    """A section with a list of texts; empty if there are none."""
    if not texts:
        return ""
    items = "".join(f"<li>{linked(text)}</li>" for text in texts)
    return f'<section><h2>{escape(title)}</h2><ul class="texts">{items}</ul></section>'


def told(codes: Iterable[str]) -> str:
    """A section that says of each code what it means and what to do; empty if there are none."""
    entries = "".join(_told(code) for code in sorted(codes))
    return f"<section><h2>What the codes mean</h2>{entries}</section>" if entries else ""


def _told(code: str) -> str:
    entry = messages.CATALOGUE[code]
    cause, remedy = (escape(with_names(text)) for text in (entry.cause, entry.remedy))
    return (
        f'<article class="code" id="{code}"><h3>{code} <small>{escape(entry.kind)}</small></h3>'
        f"<p>{cause}</p><p><b>What to do:</b> {remedy}</p></article>"
    )
