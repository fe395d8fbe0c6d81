"""What a module with modes was made from, kept beside it for ``save``."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from compile_modes.graph.dual import DualModule
from compile_modes.graph.view import View

_KEY = "compile_modes_source"


class Source:
    """The programs that a module was made from, and how. Shared between copies of the module: programs don't change."""

    def __init__(
        self,
        programs: Mapping[str, ExportedProgram],
        keep: Sequence[str] = (),
        dropout_p: Mapping[str, float] | None = None,
        *,
        together: bool = True,
        guess: bool = False,
        followers: Collection[str] | None = None,
        asleep: Mapping[str, Sequence[str]] | None = None,
        readers: Collection[str] | None = None,
    ) -> None:
        #: how several programs make one module; JSON can hold it
        self.known = {
            "together": together, "guess": guess, "followers": None if followers is None else sorted(followers),
            "asleep": dict(asleep or {}), "readers": None if readers is None else sorted(readers),
        }  # fmt: skip
        self.programs, self.keep, self.dropout_p = dict(programs), list(keep), dict(dropout_p or {})
        self.code: list[str] = []

    @classmethod
    def of(cls, module: nn.Module) -> "Source | None":
        """The source of a module; None if it has none."""
        meta = getattr(module, "meta", None)
        return meta.get(_KEY) if isinstance(meta, dict) else None

    def stay_with(self, module: Any) -> None:
        """Makes this the source of a module, as it is now."""
        self.code = _code(module)
        module.meta[_KEY] = self

    @property
    def explored(self) -> bool:
        """Whether more than two exports have told who decides."""
        return self.known["readers"] is not None

    @property
    def switches(self) -> bool:
        """Whether submodules decide by their own mode, in one graph or in each of two."""
        return bool(self.known["together"]) or any("_depth_" in name for name in self.programs)

    def made(self, module: nn.Module) -> bool:
        """Whether a module still has the graphs that it was made with."""
        return self.code == _code(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Source":
        return self


def flags(module: nn.Module) -> dict[str, bool]:
    """The mode of each submodule, by all of its names."""
    return {name: submodule.training for name, submodule in module.named_modules(remove_duplicate=False)}


def set_flags(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Sets the modes of submodules. Names that export has dropped own nothing that depends on mode, and are skipped."""
    present = dict(module.named_modules(remove_duplicate=False))
    for name, mode in modes.items():
        if name in present:
            present[name].training = mode


def _code(module: nn.Module) -> list[str]:
    roots = [module.program(mode) for mode in (True, False)] if isinstance(module, DualModule) else [module]
    return [str(body.graph) for root in roots for body in View(root).bodies]
