"""The callback for Lightning's ``Trainer``."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes.integrations.compiling import Compiling
from compile_modes.integrations.phases import TRAIN, Phases

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as missing:
    raise messages.NO_LIBRARY.error(library="lightning", error=missing, install="lightning", file=__name__) from missing


class CompileCallback(Callback):  # type: ignore[misc]  # lightning may not be there for the type checker
    """Compiles what a LightningModule calls in place, warms up both modes, and counts what was compiled.

    The steps themselves (``training_step`` with its logging) stay eager. The modules stay compiled after the training;
    checkpoints have the keys that they have without.

    The first training step warms up train and eval, with copies of the arguments that each module is called with
    there; if the sanity check comes before it, that warms up eval. Everything is as before then.

    Args:
        modules: names in ``module.named_modules()`` to compile. None: the LightningModule itself if it has a
            ``forward()``, which steps call as ``self(x)``; or else each child that has parameters.
        backend: as of ``torch.compile``.
        warmup: whether to compile eval with the first training step; without, the first validation loop compiles it.
        dynamic_batch: whether to compile for any batch size of at least two from the start, so that a last batch that
            is smaller compiles nothing. Without, the second size compiles once more.
        **compile_options: of ``torch.compile``: ``dynamic``, ``fullgraph``, ``mode``, ``options``.

    Attributes:
        phases: graphs and stalls: ``phases.all``, and ``phases.table()`` as text.

    Raises:
        OptionError: an option that ``torch.compile`` doesn't have. When a loop starts: a name of ``modules`` is not
            there, there is nothing to compile, or a module has been wrapped by ``torch.compile``.
        MissingLibraryError: on import; lightning isn't there.

    Warns:
        ModeWarning: eval could not be warmed up, a validation loop after the first has compiled, or nothing that was
            compiled has been called.
    """

    def __init__(
        self,
        modules: Sequence[str] | None = None,
        *,
        backend: str = "pt2e_modes",
        warmup: bool = True,
        dynamic_batch: bool = True,
        **compile_options: Any,
    ) -> None:
        self._compiling = Compiling(
            modules, warm=warmup, dynamic_batch=dynamic_batch, options={"backend": backend, **compile_options}
        )

    @property
    def phases(self) -> Phases:
        """Graphs and stalls, loop by loop."""
        return self._compiling.phases

    def _begin(self, trainer: Any, module: nn.Module) -> None:
        self._compiling.ensure(module, _called)
        self.phases.mark()

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Compiles in place."""
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Compiles in place, where validation comes without a training."""
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Compiles in place."""
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Compiles in place."""
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.phases.mark()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self.phases.step(TRAIN)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Ends the loop."""
        self._compiling.check_called()
        self.phases.end(TRAIN)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self.phases.step("validation")

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Ends the loop."""
        self.phases.end("validation")

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self.phases.step("test")

    def on_test_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Ends the loop."""
        self.phases.end("test")

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self.phases.step("predict")

    def on_predict_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Ends the loop."""
        self.phases.end("predict")


def _called(module: nn.Module) -> Iterator[str]:
    """What the steps of a LightningModule are taken to call."""
    own = getattr(type(module), "forward", None)
    if own not in (nn.Module.forward, LightningModule.forward):
        yield ""
        return
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield name
