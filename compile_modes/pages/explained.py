"""What explain() shows, as HTML: modes at a glance, the tree of modules with its sites, and what can't be switched."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compile_modes.pages import drawing
from compile_modes.pages.drawing import escape
from compile_modes.pages.tree import drawn, tree

_BOUND = ("flag", "override")  # held by what can be set; the others are baked in
_HELD = {
    "flag": "a flag",
    "literal": "a literal",
    "hard-coded": "a literal of the model's own",
    "kept": "a literal that is kept on request",
    "override": "an override",
}
_STUCK = "can't switch"


def explanation(report: Mapping[str, Any]) -> str:
    """The body of a page, or of a fragment.

    Args:
        report: what :func:`compile_modes.graph.explain.survey` gives; as the command line has it, also with ``file``,
            ``writer``, ``mode``, ``overrides``, ``complaints``, ``refused`` and ``graphs``.
    """
    programs = report["programs"]
    sites = [site for program in programs for site in program["sites"]]
    refused = [f"{one['site']}: {one['code']}: {one['reason']}" for one in report.get("refused", ())]
    complaints, remarks = list(report.get("complaints", ())), [r for p in programs for r in p["remarks"]]
    codes = {code for site in sites for code in site["codes"].values() if code}
    codes |= drawing.codes_in([*refused, *complaints, *remarks])
    parts = [_about(report), _glance(sites)]
    if sites:
        parts.append(drawing.controls(_facts(sites), "sites", trees=True))
    parts += [_program(program) for program in programs]
    parts += [drawing.listed("Asked for, and not possible", refused), drawing.listed("Warnings", complaints)]
    parts += [drawing.listed("May depend on mode, and is no site", remarks), _graphs(report.get("graphs", {}))]
    return "\n".join(filter(None, [*parts, drawing.told(codes)]))


def _about(report: Mapping[str, Any]) -> str:
    told = []
    if "writer" in report:
        bound = ", and bound here" if report["writer"] == "torch.export.save" else ""
        told.append(f"written by {report['writer']}(){bound}")
    if report.get("mode"):
        told.append(f"shown in {report['mode']} mode")
    told += [f"{pattern or '(root)'}={mode}" for pattern, mode in (report.get("overrides") or {}).items()]
    if report["difference"] is not None:
        told.append(f"two programs, which differ in {report['difference']}")
    return f'<p class="about">{escape("; ".join(told))}</p>' if told else ""


def _glance(sites: Sequence[Mapping[str, Any]]) -> str:
    if not sites:
        return "<p>No mode-dependent sites: this program is the same in train and in eval mode.</p>"
    modes = Counter(_mode(site) for site in sites)
    parts = {"train": (modes["train"], "train"), "eval": (modes["eval"], "eval")}
    parts |= {name: (modes[name], "both") for name in ("same in both", "computed") if modes[name]}
    held = Counter(site["held_by"] for site in sites if not site["modeless"])
    stuck = sum(bool(site["limits"]) for site in sites)
    said = [
        f"<b>{len(sites)}</b> sites",
        *(f"<b>{n}</b> held by {escape(_HELD.get(by, by))}" for by, n in held.most_common()),
    ]
    said.append(f"<b>{stuck}</b> can't be switched" if stuck else "all can be switched")
    return f'{drawing.bar(parts)}<p class="said">{"; ".join(said)}.</p>'


def _mode(site: Mapping[str, Any]) -> str:
    return site["mode"] or ("same in both" if site["modeless"] else "computed")


def _facts(sites: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found = {
        "mode": Counter(map(_mode, sites)),
        "held by": Counter(site["held_by"] for site in sites),
        "op": Counter(site["family"] for site in sites),
        "limit": Counter(_STUCK for site in sites if site["limits"]),
    }
    return {fact: dict(sorted(counts.items())) for fact, counts in found.items() if counts}


def _program(program: Mapping[str, Any]) -> str:
    if not program["sites"]:
        return ""
    sites = program["sites"]
    usual = Counter((site["mode"], site["held_by"]) for site in sites if not site["modeless"])
    common = usual.most_common(1)[0][0] if usual else None

    def matters(site: Mapping[str, Any]) -> bool:
        odd = not site["modeless"] and (site["mode"], site["held_by"]) != common
        return bool(site["limits"]) or site["inverted"] or odd

    name = program["program"]
    title = f"The program of {name} mode" if name else "Modules"
    drawn_tree = drawn(tree([(site["owner"], site) for site in sites]), _site, _badges, matters)
    return f"<section><h2>{escape(title)}</h2>{drawn_tree}</section>"


def _badges(sites: list[Any]) -> str:
    counts = Counter(_mode(site) for site in sites)
    stuck = sum(bool(site["limits"]) for site in sites)
    kinds = {"train": "train", "eval": "eval"}
    badges = [drawing.pill(f"{n} {mode}", kinds.get(mode, "both")) for mode, n in sorted(counts.items(), reverse=True)]
    return "".join(badges) + (drawing.pill(f"{stuck} {_STUCK}", "stuck") if stuck else "")


def _site(site: Mapping[str, Any], owner: str, name: str) -> str:
    literals = ", ".join(f"{key}={drawing.shown(value)}" for key, value in site["literals"].items())
    held = site["held_by"] + (", inverted" if site["inverted"] and site["held_by"] == "flag" else "")
    kind = "" if site["held_by"] in _BOUND else " baked"
    data = {"owner": owner, "mode": _mode(site), "held-by": site["held_by"], "op": site["family"]}
    data |= {"limit": _STUCK} if site["limits"] else {}
    return drawing.row(
        data,
        drawing.named(name),
        drawing.mode_pill(site["mode"], site["modeless"]),
        f"<code>{escape(site['op'])}</code>",
        f'<span class="held{kind}">by {escape(held)}</span>',
        f'<span class="literals">{escape(literals)}</span>',
        *(_limit(mode, site["codes"].get(mode, ""), why) for mode, why in site["limits"].items()),
    )


def _limit(mode: str, code: str, why: str) -> str:
    link = f' <a href="#{escape(code)}">{escape(code)}</a>' if code else ""
    return f'<span class="limit">not to {escape(mode)}{link}: {escape(why)}</span>'


def _graphs(graphs: Mapping[str, Mapping[str, str]]) -> str:
    shown = "".join(
        f"<details><summary>{escape(when)} ({escape(name)})</summary><pre>{escape(text)}</pre></details>"
        for when, texts in graphs.items()
        for name, text in texts.items()
    )
    return f"<section><h2>Graphs</h2>{shown}</section>" if shown else ""
