"""What tests ask of the package beyond its public names, in one place."""

from compile_modes._compat.frames import graphs_compiled
from compile_modes.graph.bodies import Body, bodies, canonical, dynamo_path, module_path, own, state_path
from compile_modes.graph.requests import owner_matches
from compile_modes.graph.sites import add_note, note, sites

__all__ = [
    "Body",
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
