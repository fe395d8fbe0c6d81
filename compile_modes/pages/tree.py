"""A tree of modules, and what hangs in it, as nested <details>."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compile_modes.pages.drawing import escape

_DEEP = 60  # levels that are shown as such: browsers take apart what is nested deeper than some hundreds
_FEW = 40  # items that are shown without opening anything


@dataclass
class Branch:
    """A module.

    Attributes:
        name: its name, or the names of a chain of modules of which each holds nothing but the next.
        path: its path; ``""`` for the root.
        items: what hangs at it, in order.
        children: the modules below it, by name.
    """

    name: str
    path: str
    items: list[Any] = field(default_factory=list)
    children: dict[str, "Branch"] = field(default_factory=dict)

    def below(self) -> list[Any]:
        """All items at it and below it."""
        found, pending = [], [self]
        while pending:
            branch = pending.pop()
            found += branch.items
            pending += reversed(branch.children.values())
        return found


def tree(items: Sequence[tuple[str, Any]]) -> Branch:
    """The tree of some items, each with the path of the module that it hangs at."""
    root = Branch("(root)", "")
    for path, item in items:
        branch = root
        for name in path.split(".", _DEEP) if path else ():
            below = f"{branch.path}.{name}" if branch.path else name
            branch = branch.children.setdefault(name, Branch(name, below))
        branch.items.append(item)
    pending = [root]
    while pending:
        branch = pending.pop()
        for name, child in branch.children.items():
            branch.children[name] = _without_chain(child)
        pending += branch.children.values()
    return root


def _without_chain(branch: Branch) -> Branch:
    names = [branch.name]
    while not branch.items and len(branch.children) == 1:
        (branch,) = branch.children.values()
        names.append(branch.name)
    branch.name = ".".join(names)
    return branch


def drawn(
    root: Branch,
    item: Callable[[Any, str, str], str],
    badges: Callable[[list[Any]], str],
    matters: Callable[[Any], bool],
) -> str:
    """A tree as HTML. Open is what matters, and all of a small one.

    Args:
        root: the tree.
        item: draws an item as a ``<li>``, given the path of its module, and the name to show of that, if any.
        badges: draws what stands beside a module's name, of all items below it.
        matters: whether an item is worth a look.
    """
    small = len(root.below()) <= _FEW
    opened = {id(one) for one in root.below() if small or matters(one)}
    return f'<div class="tree">{_drawn(root, item, badges, opened)}</div>'


def _drawn(
    branch: Branch, item: Callable[[Any, str, str], str], badges: Callable[[list[Any]], str], opened: set[int]
) -> str:
    below = branch.below()
    if len(below) == len(branch.items) == 1 and branch.path:  # its one site says it all
        return f'<ul class="sites">{item(below[0], branch.path, branch.name)}</ul>'
    is_open = not branch.path or any(id(one) in opened for one in below)
    items = "".join(item(one, branch.path, "") for one in branch.items)
    listed = f'<ul class="sites">{items}</ul>' if items else ""
    # Children with sites of their own among them come in the order in which the program runs them.
    children = "".join(_drawn(child, item, badges, opened) for child in branch.children.values())
    return (
        f"<details{' open' if is_open else ''}><summary><code>{escape(branch.name)}</code>{badges(below)}</summary>"
        f"{listed}{children}</details>"
    )
