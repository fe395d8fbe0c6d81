"""What ``python -m compile_modes package`` and ``inspect`` do."""

import argparse
import importlib
import json
from typing import Any

import torch
from torch import nn

from compile_modes import messages
from compile_modes.cli.commands import FINE, guarded
from compile_modes.cli.files import Opened, check_free, open_file
from compile_modes.exported.binding import bind
from compile_modes.exported.provenance import Source
from compile_modes.graph.requests import MODES
from compile_modes.package.inspecting import as_text, inspected
from compile_modes.package.packaging import package

_EPILOG = """\
A mode is train, eval, or a name of yours with globs of submodules, the rest of which are in eval mode:
  --mode train --mode eval --mode mc:*.drop=train

The arguments to compile for are the examples in the file. Without --loss, the first output is the loss of mode train.

exit status:
  0  all is well
  1  the model can't be bound
  2  wrong usage, or the file can't be read, packaged or written

A file of torch.export.save() is unpickled: don't open any that you don't trust.
"""


def add_to(commands: Any) -> None:
    """Adds the two commands to an argparse parser's subparsers."""
    text = "compile a .pt2 file ahead of time, in several modes over one set of weights"
    raw = argparse.RawDescriptionHelpFormatter
    make = commands.add_parser("package", help=text, description=text, epilog=_EPILOG, formatter_class=raw)
    make.add_argument("file", help="a .pt2 file of torch.export.save() or compile_modes.save()")
    make.add_argument("-o", "--output", required=True, metavar="FILE", help="the .pt2 file to write")
    make.add_argument(
        "--mode", action="append", type=_mode, metavar="NAME[:GLOB=MODE,...]", help="default: train, eval"
    )
    make.add_argument("--loss", metavar="MODULE:FUNCTION", help="called with the outputs and the targets")
    make.add_argument(
        "--target", action="append", default=[], type=_target, metavar="DTYPE:SIZES", help="of the loss: int64:8"
    )
    make.add_argument("--force", action="store_true", help="replace a file that is there")
    make.set_defaults(imports=[], run=lambda args: guarded(_package, args))
    text = "show what is in a package: modes, signature, weights, sites"
    show = commands.add_parser("inspect", help=text, description=text)
    show.add_argument("file", help="a .pt2 file of compile_modes.package()")
    show.add_argument("--json", action="store_true", help="for machines")
    show.set_defaults(imports=[], run=lambda args: guarded(_inspect, args))


def _mode(text: str) -> tuple[str, str | dict[str, str]]:
    name, colon, globs = text.partition(":")
    if not colon:
        return name, name
    pairs = [part.rpartition("=") for part in globs.split(",")]
    if not all(equals and mode in MODES for _, equals, mode in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'mc:*.drop=train'")
    return name, {pattern: mode for pattern, _, mode in pairs}


def _target(text: str) -> torch.Tensor:
    name, _, sizes = text.partition(":")
    dtype = getattr(torch, name, None)
    numbers = sizes.split(",") if sizes else []
    if not isinstance(dtype, torch.dtype) or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'int64:8' or 'float32:8,10'")
    return torch.zeros([int(number) for number in numbers], dtype=dtype)


def _package(args: argparse.Namespace) -> int:
    if not args.force:
        check_free(args.output)
    opened = open_file(args.file)
    module: nn.Module = opened.content if isinstance(opened.content, nn.Module) else bind(opened.content)
    modes: Any = dict(args.mode) if args.mode else ("train", "eval")
    loss, targets = _loss(args.loss), tuple(args.target)
    given, named = _examples(opened, args.file)
    package(module, given, args.output, kwargs=named, modes=modes, loss=loss, targets=targets)
    print(f"{args.output}: {', '.join(modes)}")
    return FINE


def _examples(opened: Opened, file: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that the program was exported with."""
    content = opened.content
    source = Source.of(content) if isinstance(content, nn.Module) else None
    programs = source.programs if source is not None else opened.programs
    for program in programs.values():
        if program.example_inputs is not None:
            return tuple(program.example_inputs[0]), dict(program.example_inputs[1])
    raise messages.NO_EXAMPLES.error(file=file)


def _loss(named: str | None) -> Any:
    if named is None:
        return None
    module, _, name = named.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise messages.NO_SUCH_LOSS.error(error=error, name=named) from error


def _inspect(args: argparse.Namespace) -> int:
    said = inspected(args.file)
    print(json.dumps(said, indent=2) if args.json else as_text(said))
    return FINE
