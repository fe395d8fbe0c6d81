"""What Dynamo keeps of compilations: wrappers around modules, and the cache entries of each function.

Checked on torch 2.11.0, 2.13.0 and 2.14.1. A cache is a list per code object: a hit moves its entry to the front, a new
entry is put there, an invalidated one is emptied and moved to the back, where it stays. Before it compiles, Dynamo
counts the entries, emptied ones included, against ``recompile_limit``; it leaves out those that were made for other
objects than the frame at hand holds, by ``id_matched_objs``.
"""

import types
import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch._C._dynamo import eval_frame as native
from torch._dynamo import config
from torch._dynamo.cache_size import _has_same_id_matched_objs
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this very module go through ``torch.compile``: a wrapper, ``compile()``, or its ``forward``."""
    forward = vars(module).get("forward")
    return (
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile`` has put around a module."""
    return isinstance(module, OptimizedModule)


class _Nobody:
    """The object that entries belong to which Dynamo shall not count."""


_nobody = _Nobody()


class Compilation:
    """The compilation in progress, and the cache that it will add an entry to."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self.code: types.CodeType = output.root_tx.f_code
        current = CompileContext.current_compile_id()
        self.id = str(current)
        self.ordinal = int(getattr(current, "frame_compile_id", None) or 0)

    @classmethod
    def current(cls) -> "Compilation | None":
        """The one in progress; None outside Dynamo."""
        try:
            return cls(InstructionTranslator.current_tx().output)
        except AttributeError:
            return None

    def flags(self) -> frozenset[tuple[str, bool]]:
        """Every ``training`` that this compilation has read and is guarded on, with its value."""
        scope = {"L": self._output.local_scope, "G": self._output.global_scope}
        names = {str(g.name() if callable(g.name) else g.name) for g in self._output.guards}
        # Expressions that Dynamo generated for its guards.
        return frozenset((name, bool(eval(name, scope))) for name in names if name.endswith(".training"))

    def entries(self) -> list[Any]:
        """The entries that are in use, the one used last first."""
        if hasattr(native, "get_eval_frame_isolate_recompiles_id"):  # torch 2.13: torch.compile(isolate_recompiles=)
            region = native.get_eval_frame_isolate_recompiles_id()
            found = native._get_cache_entries_for_region(self.code, region)
        else:
            found = native._debug_get_cache_entry_list(self.code)
        return [entry for entry in found if not isinstance(entry.guard_manager, DeletedGuardManagerWrapper)]

    def counts(self, entry: Any) -> bool:
        """Whether Dynamo counts an entry against the limit."""
        frame: Any = types.SimpleNamespace(f_locals=self._output.local_scope)
        return _has_same_id_matched_objs(frame, entry)


def entry_id(entry: Any) -> str:
    """The id of the compilation that made an entry."""
    return str(entry.compile_id)


def limits() -> tuple[int, int]:
    """How many entries Dynamo makes of one function, and how often it compiles one in all."""
    return config.recompile_limit, config.accumulated_recompile_limit


def raised_limits(count: int) -> AbstractContextManager[None]:
    """Has Dynamo compile ``count`` more entries of each function than it would."""
    now, accumulated = limits()
    patched: AbstractContextManager[None] = config.patch(
        recompile_limit=now + count, accumulated_recompile_limit=accumulated + count
    )
    return patched


def uncount(entry: Any) -> None:
    """Lets an entry not count against the limit."""
    entry.guard_manager.id_matched_objs[""] = weakref.ref(_nobody)


def evict(entry: Any) -> None:
    """Frees the code of an entry, which can't be hit any more and does not count.

    Dynamo does the same when an object dies that an entry is guarded on. Frames that run the code keep it alive.
    """
    deleted = DeletedGuardManagerWrapper("evicted by compile_modes: other modes were used more recently")
    deleted.id_matched_objs[""] = weakref.ref(_nobody)
    entry.guard_manager.extra_state.invalidate(entry, deleted)
