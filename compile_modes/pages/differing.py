"""What diff() has found, as HTML: how much at a glance, the tree of modules with the sites that differ, and weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compile_modes.pages import drawing
from compile_modes.pages.drawing import escape
from compile_modes.pages.tree import drawn, tree

_KINDS = {"changed": "changed", "lost": "lost", "added": "added"}  # the kinds of pills, by what has happened


def difference(report: Mapping[str, Any]) -> str:
    """The body of a page, or of a fragment.

    Args:
        report: what ``DiffReport.to_json()`` gives.
    """
    sites, weights, compared = report["sites"], report["weights"], report["compared"]
    parts = []
    if not report["differ"]:
        said = f"{drawing.counted(compared['sites'], 'pairs')} of sites and {compared['weights']} of weights"
        parts.append(f'<p class="equal">Nothing differs: {escape(said)} are the same.</p>')
    elif sites or weights:
        parts += [_glance(report), drawing.controls(_facts(sites, weights), "differences", trees=bool(sites))]
    if report["programs"]:
        parts.append(drawing.listed("Programs", [report["programs"]]))
    for program in dict.fromkeys(site["program"] for site in sites):
        mine = [site for site in sites if site["program"] == program]
        title = f"Sites of the program of {program} mode" if program else "Sites"
        hung = drawn(tree([(site["owner"], site) for site in mine]), _site, _badges, lambda site: True)
        parts.append(f"<section><h2>{escape(title)}</h2>{hung}</section>")
    if weights:
        rows = "".join(map(_weight, weights))
        parts.append(f'<section><h2>Weights</h2><div class="tree"><ul class="sites">{rows}</ul></div></section>')
    left_out = [f"{name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join([*parts, drawing.listed("Weights whose values were not compared", left_out)])


def _glance(report: Mapping[str, Any]) -> str:
    counts, compared = report["counts"], report["compared"]
    bars = []
    for kind in ("sites", "weights"):
        equal = compared[kind] - counts[kind]["changed"]
        parts = {"equal": (equal, "equal"), **{what: (counts[kind][what], what) for what in _KINDS}}
        bars.append(f"<h2>{kind.capitalize()}</h2>{drawing.bar(parts)}")
    return f'<div class="glance">{"".join(f"<div>{one}</div>" for one in bars)}</div>'


def _facts(sites: Sequence[Mapping[str, Any]], weights: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    names = Counter(name for site in sites if site["what"] == "changed" for name in site["changes"])
    found = {
        "what": Counter(item["what"] for item in [*sites, *weights]),
        "differs in": names + Counter(weights=len(weights)),
    }
    return {fact: dict(sorted(counts.items())) for fact, counts in found.items() if counts}


def _badges(sites: list[Any]) -> str:
    counts = Counter(site["what"] for site in sites)
    return "".join(drawing.pill(f"{counts[what]} {what}", kind) for what, kind in _KINDS.items() if counts[what])


def _site(site: Mapping[str, Any], owner: str, name: str) -> str:
    changes = site["changes"]
    if site["what"] == "changed":
        told = [_change(key, *pair) for key, pair in changes.items()]
    else:
        side = 0 if site["what"] == "lost" else 1
        told = [_told(", ".join(f"{key}={drawing.shown(pair[side])}" for key, pair in changes.items()))]
        changes = {}
    return _row(
        site["what"], owner, "|".join(changes), drawing.named(name), f"<code>{escape(site['op'])}</code>", *told
    )


def _change(name: str, before: Any, after: Any) -> str:
    modes = name == "mode"
    sides = [drawing.mode_pill(v) if modes else f"<code>{escape(drawing.shown(v))}</code>" for v in (before, after)]
    return f'<span class="change">{escape(name)}: {sides[0]} → {sides[1]}</span>'


def _weight(weight: Mapping[str, Any]) -> str:
    parts = [weight["before"] or weight["after"]]
    if weight["what"] == "changed" and weight["before"] != weight["after"]:
        parts = [f"{weight['before']} → {weight['after']}"]
    if weight["elements"]:
        largest = weight["largest"] if isinstance(weight["largest"], str) else f"{weight['largest']:.3g}"
        parts.append(f"off by up to {largest} in {drawing.counted(weight['elements'], 'elements')}")
    name = f"<code>{escape(weight['name'])}</code>"
    return _row(weight["what"], weight["name"], "weights", name, _told(", ".join(parts)))


def _told(text: str) -> str:
    return f'<span class="literals">{escape(text)}</span>'


def _row(what: str, owner: str, differs_in: str, *cells: str) -> str:
    data = {"owner": owner, "what": what, "differs-in": differs_in}
    return drawing.row(data, drawing.pill(what, _KINDS[what]), *cells)
