"""What ``python -m compile_modes explain`` and ``bake`` do."""

import argparse
import importlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compile_modes import messages, pages
from compile_modes.cli.files import Opened, check_free, open_file, write_program
from compile_modes.errors import BindError, CompileModesError
from compile_modes.exported.programs import Request, prepare, refusals
from compile_modes.graph.dual import DualModule
from compile_modes.graph.explain import as_text, graph_text, survey, surveyed
from compile_modes.graph.requests import MODES

FORMAT = 1  # of explain's --json; raised when a key goes or changes its meaning
FINE, STUCK, UNUSABLE = 0, 1, 2  # exit statuses
_STATUS = """\
exit status:
  0  all is well
  1  {what}
  2  wrong usage, or a file that can't be read or written

A file of torch.export.save() is unpickled: don't open any that you don't trust.
"""
_JSON = """\
--json prints one object, with the keys
  format       1
  file, writer the path, and "torch.export.save" or "compile_modes.save"
  stored       names of the programs in it: "model", or "train" and "eval"
  mode, overrides  what was asked for
  difference   of two programs, what they differ in besides modes
  programs     for each: program (a name, or null), sites, totals, remarks; a site has op, family, owner, mode,
               held_by (once bound: flag, literal, hard-coded, kept, override), inverted, modeless, literals,
               limits (why it can't be put into "train" or "eval"), and codes, those of these reasons
  complaints   what isn't, or may not be, right in the mode that is asked for, if none is in the other mode
  refused      sites that overrides name and that can't be put there: site, code and reason
  graphs       with --graph: before and after, each with the text of a graph by name of the program
"""


def add_to(commands: Any) -> None:
    """Adds the two commands to an argparse parser's subparsers."""
    status = "with --strict: something that depends on mode can't be switched, or not as asked"
    explain = _command(commands, "explain", _explain, "list what depends on mode in a .pt2 file", status, _JSON)
    explain.add_argument("--mode", choices=MODES, help="show it as it would be in this mode")
    explain.add_argument("--graph", action="store_true", help="show the graph as it is stored, and as it would be")
    explain.add_argument("--json", action="store_true", help="for machines, see below")
    add_page(explain)
    explain.add_argument("--strict", action="store_true", help="exit with 1 if something can't be switched")
    status = "something that depends on mode can't be put into the mode that is asked for; nothing is written"
    bake = _command(commands, "bake", _bake, "write a standard program in one mode, for torch.export.load()", status)
    bake.add_argument("--mode", choices=MODES, help="default: the modes that are in the file")
    bake.add_argument("-o", "--output", required=True, metavar="FILE", help="the .pt2 file to write")
    bake.add_argument("--force", action="store_true", help="replace a file that is there")
    bake.add_argument("--allow-stuck", action="store_true", help="write it nonetheless, and warn")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, status: str, more: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=_STATUS.format(what=status) + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a .pt2 file of torch.export.save() or compile_modes.save()")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=_override,
        metavar="GLOB=MODE",
        help="put the sites of these owners into train or eval; the first that matches decides",
    )
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE", help="import it first, for its ops"
    )
    parser.set_defaults(run=lambda args: guarded(run, args))
    return parser


def add_page(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a command that writes a page."""
    parser.add_argument("--html", metavar="FILE", help="write it as a page that needs no network")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def write_page(args: argparse.Namespace, title: str, body: str) -> None:
    """Writes the page that is asked for, if one is."""
    if args.html is not None:
        pages.write(pages.document(title, body), args.html)
        print(args.html, file=sys.stderr)


def _override(text: str) -> tuple[str, str]:
    pattern, equals, mode = text.rpartition("=")  # the root's pattern is empty
    if not equals or mode not in MODES:
        raise argparse.ArgumentTypeError(f"{text!r} is not like '*.bn=eval'")
    return pattern, mode


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, stuck: int = STUCK) -> int:
    """Runs a command; what is wrong with its input is said on stderr, without a traceback.

    Args:
        run: the command, and ``args`` what it takes.
        stuck: the exit status for what can't be bound.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of some torch releases, about their own code
            warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
            for name in args.imports:
                _import(name)
            status = run(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # whoever reads, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except CompileModesError as error:
        print(f"error: {error}", file=sys.stderr)
        return stuck if isinstance(error, BindError) else UNUSABLE


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise messages.NOT_IMPORTED.error(error=error, name=name) from error


def _explain(args: argparse.Namespace) -> int:
    if args.html is not None and not args.force:
        check_free(args.html)
    report = _report(open_file(args.file), args)
    write_page(args, f"Modes: {args.file}", pages.explanation(report))
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return STUCK if args.strict and (report["complaints"] or report["refused"]) else FINE


def _report(opened: Opened, args: argparse.Namespace) -> dict[str, Any]:
    """What ``explain --json`` prints; the keys are described in its help."""
    report = {"format": FORMAT, "file": args.file, "writer": opened.writer, "stored": list(opened.programs)}
    report |= {"mode": args.mode, "overrides": _overrides(args)}
    if isinstance(opened.content, DualModule) and args.mode is None and not args.override:
        both = opened.content
        report |= {**survey(both), "complaints": [], "refused": []}
        after = {name: graph_text(both.program(name == "train")) for name in ("train", "eval")} if args.graph else {}
    else:
        request = _requested(opened, args)
        report |= {"difference": None, "programs": [_program(request)], "complaints": [*map(str, request.complaints)]}
        refused = [(str(site), *messages.parted(why)) for site, why in request.refused]
        report["refused"] = [{"site": site, "code": code, "reason": text} for site, code, text in refused]
        after = {request.name: _after(request, args)} if args.graph else {}
    if args.graph:
        before = {name: graph_text(opened.programs[name].module()) for name in after}
        report["graphs"] = {"before": before, "after": after}
    return report


def _requested(opened: Opened, args: argparse.Namespace) -> Request:
    return prepare(opened.content, None if args.mode is None else MODES[args.mode], _overrides(args))


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for pattern, mode in args.override:
        overrides.setdefault(pattern, mode)  # of a pattern that is given twice, the first counts
    return overrides


def _program(request: Request) -> dict[str, Any]:
    """The sites in the modes that are asked for."""
    refused = {site for site, _ in request.refused}
    found = [site if site in refused else replace(site, training=mode) for site, mode in request.modes.items()]
    part = None if request.holder is request.view.root else request.name
    return surveyed(request.view, found, part, {site.node for site in request.overridden - refused})


def _after(request: Request, args: argparse.Namespace) -> str:
    asks = args.mode is not None or args.override
    return graph_text(request.carried_out().module() if asks else request.view.root)


def _as_text(report: dict[str, Any]) -> str:
    asked = [f"{report['mode']} mode"] * bool(report["mode"]) + [f"{k}={v}" for k, v in report["overrides"].items()]
    bound = " and bound here" if report["writer"] == "torch.export.save" else ""
    title = f"{report['file']}, written by {report['writer']}(){bound}" + "".join(f", {item}" for item in asked)
    parts = [title, as_text(report), *report["complaints"]]
    parts += [f"can't be overridden: {r['site']}: {r['code']}: {r['reason']}" for r in report["refused"]]
    for when, graphs in report.get("graphs", {}).items():
        parts += [f"{when} ({name}):\n{graph}" for name, graph in graphs.items()]
    return "\n\n".join(parts)


def _bake(args: argparse.Namespace) -> int:
    if not args.force:
        check_free(args.output)
    request = _requested(open_file(args.file), args)
    said = [*refusals(request), *request.complaints]
    for warning in said:
        print(f"{'warning' if args.allow_stuck else 'error'}: {warning}", file=sys.stderr)
    if said and not args.allow_stuck:
        print("nothing is written; --allow-stuck leaves that as it is", file=sys.stderr)
        return STUCK
    refused = {site for site, _ in request.refused}
    modes = Counter(site.training if site in refused else mode for site, mode in request.modes.items())
    write_program(request.carried_out(), args.output)
    print(f"{args.output}: {modes[True]} sites in train, {modes[False]} in eval, {modes[None]} the same in both")
    return FINE
