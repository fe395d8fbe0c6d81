"""``ModePass``: the backend's rewrite as a pass of stock Inductor."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx, nn

from compile_modes import _compat, messages
from compile_modes._compat import frames
from compile_modes._compat.passes import CustomGraphPass, as_in_backends, is_body, provenance
from compile_modes.backend.capture import capture
from compile_modes.backend.nested_regions import separate
from compile_modes.backend.overrides import Asked, put_into_modes
from compile_modes.backend.owners import Names, name_owners
from compile_modes.errors import CaptureError
from compile_modes.forms.lower import lower
from compile_modes.graph.requests import check_overrides
from compile_modes.graph.sites import Site
from compile_modes.graph.view import View


class ModePass(CustomGraphPass):
    """Puts sites into a mode under stock Inductor, whatever the flags of the module say.

    ``torch.compile(m, options={"pre_grad_custom_pass": cm.ModePass(training=False)})``. Each site is rewritten before
    autograd is derived, as the backend ``pt2e_modes`` does it. Equal passes are interchangeable: compiled code, and
    entries of Inductor's caches, are shared between them and never with others.

    What the backend can do and a pass can't: wake a batch norm that is in eval, for Dynamo leaves its
    ``num_batches_tracked`` out of the graph. Switch the module to train instead, and give the pass what stays in eval.

    Args:
        training: the mode for all sites that no override names; None leaves them in theirs.
        overrides: ``{owner glob: "train" | "eval"}``; the first pattern that matches a site's owner decides.

    Raises:
        OptionError: an argument is not usable.

    When the compiled module is called, OverrideError: a pattern matches no site, or a site can't be put into the mode
    asked for; and CaptureError: the graph can't be retraced, and modes were asked for (a ModeWarning if not).
    """

    def __init__(self, training: bool | None = None, overrides: Mapping[str, str] | None = None) -> None:
        self._overrides = check_overrides(training, overrides)
        self._training = training

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites Dynamo's graph in place."""
        gm = graph.owning_module
        assert gm is not None, "Inductor's passes get graphs of modules"
        if is_body(gm):
            return  # the graph that runs it comes next
        explicit = self._training is not None or bool(self._overrides)
        try:
            with as_in_backends():
                captured = _retraced(gm)
        except CaptureError as error:
            if explicit:
                raise
            messages.PASS_LEAVES_GRAPH.warn_once(error=error.headline, where=error.where)
            return
        if explicit:
            separate(captured)
        names = Names.of_frame()
        found = name_owners(View(captured), names)
        if explicit:
            asked = Asked(self._training, self._overrides, whole=frames.is_whole_frame(gm))
            put_into_modes(captured, found, names, asked, _refusal)
        with as_in_backends():
            lower(captured, found)
        _replace(graph, captured)

    def uuid(self) -> str:
        """What Inductor's caches know this pass by: its sources, its options, and, within a compilation, the owners
        of the graph's nodes, of which the graph's text says nothing.
        """
        digest = hashlib.sha256(f"{_sources()} {self}".encode())
        for item in provenance():
            digest.update(item.encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"ModePass(training={self._training}, overrides={self._overrides})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModePass) and repr(self) == repr(other)  # the order of overrides counts

    def __hash__(self) -> int:
        return hash(repr(self))


def _retraced(gm: fx.GraphModule) -> fx.GraphModule:
    inputs = [_compat.value(placeholder) for placeholder in gm.graph.find_nodes(op="placeholder")]
    if any(value is None for value in inputs):
        raise messages.UNKNOWN_INPUTS.error()
    return capture(gm, inputs)


def _refusal(site: Site, training: bool, _: dict[Site, nn.Module]) -> str:
    why = site.refusal(training)
    if why and training and site.counter is not None and site.step is None and site.counter_at is None:
        return messages.OUT_OF_PASS.reason(why=messages.parted(why)[1])
    return why


def _replace(graph: fx.Graph, captured: fx.GraphModule) -> None:
    """Puts the nodes of a retrace into the graph that was traced, whose inputs stay the very nodes that they are."""
    gm: Any = graph.owning_module
    placeholders = graph.find_nodes(op="placeholder")
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    for node in captured.graph.find_nodes(op="get_attr"):
        name = str(node.target).partition(".")[0]
        setattr(gm, name, getattr(captured, name))  # bodies and constants; those of the old nodes are unused now
    inside = dict(zip(captured.graph.find_nodes(op="placeholder"), placeholders, strict=True))
    graph.output(graph.graph_copy(captured.graph, inside))
    gm.recompile()


@functools.cache
def _sources() -> str:
    """A hash of this package's sources."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
