"""What tests ask of the package beyond its public names, in one place."""

from typing import Any

from torch import nn

from compile_modes._compat.frames import graphs_compiled
from compile_modes.graph.edits import own
from compile_modes.graph.finding import sites
from compile_modes.graph.owners import canonical, dynamo_path, module_path
from compile_modes.graph.requests import owner_matches
from compile_modes.graph.sites import add_note, note
from compile_modes.graph.view import Body, View

__all__ = [
    "Body",
    "View",
    "add_note",
    "bodies",
    "canonical",
    "dynamo_path",
    "graphs_compiled",
    "module_path",
    "note",
    "own",
    "owner_matches",
    "sites",
    "state_path",
]


def bodies(root: nn.Module) -> list[Body]:
    """All graphs of a module, the root's first."""
    return View(root).bodies


def state_path(body: Body, value: Any) -> str | None:
    """The path of the parameter or buffer that a value of a graph is."""
    return body.view.state[value]
