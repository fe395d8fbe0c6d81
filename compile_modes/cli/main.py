"""Command line: ``compile-modes``, or ``python -m compile_modes``, and the name of a command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import compile_modes
from compile_modes.cli import commands, diff, packages

SCRIPT = "compile-modes"  # its name in pyproject.toml

# Distributions of the "demo" extra, by the module that they bring.
_DEMO_EXTRA = {"sklearn": "scikit-learn", "rich": "rich"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that ``argv`` names; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    script = Path(sys.argv[0]).stem == SCRIPT
    parser = argparse.ArgumentParser(
        prog=SCRIPT if script else "python -m compile_modes", description="train() and eval() in compiled models"
    )
    versions = f"compile_modes {compile_modes.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=versions)
    subparsers = parser.add_subparsers(dest="command", title="commands")
    demo = subparsers.add_parser("demo", help="train an exported CNN on digits, and compare with an eager twin")
    demo.add_argument(
        "--epochs", type=_positive, default=8, help="default: %(default)s; the second half runs part-frozen"
    )
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(run=_demo)
    commands.add_to(subparsers)
    diff.add_to(subparsers)
    packages.add_to(subparsers)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _demo(args: argparse.Namespace) -> int:
    try:
        from compile_modes.cli import demo  # here, for it needs what only the extra installs
    except ModuleNotFoundError as error:
        missing = _DEMO_EXTRA.get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        print(f'the demo needs {missing}: pip install "compile_modes[demo]"', file=sys.stderr)
        return 2
    return demo.main(args.epochs, args.seed)
