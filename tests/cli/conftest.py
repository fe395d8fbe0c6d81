"""Files for the command line, and a way to run it without a process of its own."""

import re

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes.__main__ import main
from nets import IMAGE, TOKENS, VECTORS, Attention, Auxiliary, EveryFlag, HardCoded, Small


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file of each kind; the working directory of all tests, so that messages hold no other path."""
    folder = tmp_path_factory.mktemp("files")
    torch.export.save(torch.export.export(Small(4), (VECTORS,)), folder / "train.pt2")
    torch.export.save(torch.export.export(Attention().eval(), (TOKENS,)), folder / "attention.pt2")
    torch.export.save(torch.export.export(nn.Linear(4, 4), (VECTORS,)), folder / "linear.pt2")
    cm.save(cm.bind(torch.export.export(HardCoded().eval(), (VECTORS,)), keep=[""]), folder / "kept.pt2")
    cm.save(cm.export(EveryFlag(), (VECTORS,)), folder / "flags.pt2")
    cm.save(cm.export(Auxiliary(), (IMAGE,)), folder / "two.pt2")
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Runs a command line; returns its exit status, stdout and stderr."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*argv):
        capsys.readouterr()
        try:
            status = main(list(argv))
        except SystemExit as end:
            status = end.code
        return status, *map(short, capsys.readouterr())

    return run


def short(text):
    """Output with the parts left out that are too long for a line of this file, or belong to torch or Python."""
    text = text.replace(", bn.weight, bn.bias, bn.running_mean, bn.running_var", ", ...")
    text = text.replace(": the op had none, or it was traced in eval mode and its p is lost", " ...")
    return re.sub("(invalid choice: 'both'|can't load the program:).*", r"\1 ...", text)
