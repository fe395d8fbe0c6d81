"""What ``python -m compile_modes diff`` does."""

import argparse
import json
from typing import Any

from compile_modes import pages
from compile_modes.cli.commands import FINE, STUCK, UNUSABLE, add_page, guarded, write_page
from compile_modes.cli.files import check_free, open_file
from compile_modes.exported.differing.diff import compared

FORMAT = 1  # of --json; raised when a key goes or changes its meaning
_EPILOG = """\
exit status:
  0  nothing differs
  1  something does
  2  wrong usage, or a file that can't be read or written

--json prints one object, with the keys
  format       1
  names        the paths of the two files
  differ       whether anything does
  counts       how many sites and weights are changed, lost and added
  programs     what differs in the programs that the files hold, in words
  sites        what, program, owner, op, and changes: before and after, by name
  weights      what, name, before, after, largest (difference), elements (that differ)
  compared     how many pairs of sites and weights
  left_out     weights whose values could not be compared, and why

Of ops that don't depend on mode nothing is said. A file of torch.export.save() is unpickled: don't open any that you
don't trust.
"""


def add_to(commands: Any) -> None:
    """Adds the command to an argparse parser's subparsers."""
    text = "show what two .pt2 files differ in: modes, literals, weights"
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("diff", help=text, description=text, epilog=_EPILOG, formatter_class=raw)
    for name in ("first", "second"):
        parser.add_argument(name, help="a .pt2 file of torch.export.save() or compile_modes.save()")
    parser.add_argument("--json", action="store_true", help="for machines, see below")
    add_page(parser)
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE", help="import it first, for its ops"
    )
    parser.set_defaults(run=lambda args: guarded(_diff, args, stuck=UNUSABLE))


def _diff(args: argparse.Namespace) -> int:
    if args.html is not None and not args.force:
        check_free(args.html)
    first, second = (open_file(path).content for path in (args.first, args.second))
    report = compared(first, second, (args.first, args.second))
    data = report.to_json()
    write_page(args, f"{args.first} → {args.second}", pages.difference(data))
    print(json.dumps({"format": FORMAT, **data}, indent=2) if args.json else report)
    return STUCK if report else FINE
