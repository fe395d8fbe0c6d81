"""A mode-dependent site: which node, whose, in which mode, and what can be done about it."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from compile_modes import _compat, messages
from compile_modes.graph.ops import LOST_DROPOUT, ModeOp
from compile_modes.graph.owners import module_class
from compile_modes.graph.regions import Region
from compile_modes.graph.view import Body

# Node meta that export, Dynamo and AOTAutograd carry along (``custom``), under this key.
NOTES = "compile_modes"
HARD_CODED, KEPT = "hard-coded", "kept"
BOUND = "compile_modes_bound"  # in the meta of a GraphModule that bind() has seen
REMARKS = "compile_modes_remarks"  # there too: what depends on mode and is no site, a line each for explain()


@dataclass(frozen=True, eq=False)
class Reach:
    """A graph that can read a counter, the node there before which to step it, and the counter's node or attribute."""

    body: Body
    anchor: fx.Node
    counter: fx.Node | str


@dataclass(eq=False)
class Site:
    """One node whose result or side effects depend on mode.

    Attributes:
        node: the node, and ``body`` the graph that it stands in.
        op: the table's row.
        owner: dotted path of the submodule whose ``training`` decides (``""`` for the root).
        training: the mode it is in; None if it has none (``modeless``) or computes it.
        modeless: whether it does the same in both modes, such as a batch norm without running statistics.
        bound: whether it reads its owner's ``training`` instead of a literal.
        hard_coded: whether :func:`compile_modes.bind` found its literal at odds with its owner's other sites.
        inverted: whether it is in train while its owner's flag says eval (``F.dropout(x, p, not self.training)``).
        region: the nodes that the site consists of, if they are not folded into ``node`` yet.
        counter: attribute path of the ``num_batches_tracked`` that eager advances beside it in train, if any.
        step: the node that advances the counter.
        counter_at: without a step, where one could stand.
        given_p: the probability in train mode, from someone who knows what the graph has lost.
    """

    node: fx.Node
    body: Body
    op: ModeOp
    owner: str
    training: bool | None
    modeless: bool
    bound: bool
    hard_coded: bool
    inverted: bool = False
    region: Region | None = None
    counter: str | None = None
    step: fx.Node | None = None
    counter_at: Reach | None = None
    given_p: float | None = None

    def read(self, name: str) -> Any:
        """The operand for argument ``name`` of the op's schema."""
        return self.op.read(self.node.args, dict(self.node.kwargs), name)

    @property
    def p(self) -> float | None:
        """Probability in train mode; None if the op has none or the graph has lost it."""
        if self.given_p is not None:
            return self.given_p
        if self.op.p is None:
            return note(self.node).get("p") if self.op is LOST_DROPOUT else None
        value: float | None = self.read(self.op.p)
        if self.op.flag is None and isinstance(value, fx.Node) and self.bound:
            return value.args[1]
        return value or note(self.node).get("p", value if self.op.flag else None)

    @property
    def lacks_p(self) -> bool:
        """Whether Python may have chosen a probability of 0 for eval, as it does for attention; modules keep theirs."""
        named = issubclass(module_class(self.node) or object, _compat.DROPOUT)
        has_p = self.op.family in ("attention", "dropout")
        return has_p and not self.p and (self.op.flag is None or not named)

    @property
    def literals(self) -> dict[str, Any]:
        """What the op is set to besides its mode: probability, or momentum and eps."""
        shown = {} if self.op.p is None else {"p": self.p}
        return shown | {name: self.read(name) for name in self.op.shown}

    def refusal(self, training: bool) -> str:
        """Why the site cannot be put into the given mode, with its code in front; empty if it can."""
        if self.modeless or self.training is training:
            return ""
        if self.op is LOST_DROPOUT and self.p:
            return ""  # supplied by someone who knows
        if self.op.refusal:
            return note(self.node).get("refusal") or self.op.refusal
        if self.training is None:
            return messages.COMPUTED.reason(argument=self.op.flag or self.op.p)
        if not training or self.bound:
            return ""
        return self._not_to_train()

    def _not_to_train(self) -> str:
        if self.lacks_p:
            return messages.LACKS_P.reason(argument=self.op.p)
        if self.op.counter and self.read(self.op.shown[0]) == 0:
            return messages.CUMULATIVE.reason()
        if self.op.stats and not self.body.runs_once:
            return messages.RUNS_OFTEN.reason()
        if self.counter and self.step is None and self.counter_at is None:
            return messages.OUT_OF_REACH.reason(counter=self.counter)
        return ""

    def __str__(self) -> str:
        mode = {True: "train", False: "eval", None: "no mode"}[self.training]
        return f"{self.node.name} ({self.op}, owner {self.owner!r}, {mode})"


def note(node: fx.Node) -> dict[str, Any]:
    """What this package has noted on a node; survives deepcopy, export and Dynamo."""
    noted: dict[str, Any] = (node.meta.get("custom") or {}).get(NOTES, {})
    return noted


def add_note(node: fx.Node, **items: Any) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), NOTES: {**note(node), **items}}
