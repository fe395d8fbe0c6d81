"""The callback for Hugging Face's ``Trainer``."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from compile_modes import messages
from compile_modes.integrations.compiling import Compiling
from compile_modes.integrations.phases import TRAIN, Phases

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise messages.NO_LIBRARY.error(
        library="transformers", error=missing, install="transformers accelerate", file=__name__
    ) from missing


class CompileCallback(TrainerCallback):  # type: ignore[misc]  # transformers may not be there for the type checker
    """Compiles the model of a ``transformers.Trainer`` in place, warms up both modes, and counts what was compiled.

    The model stays what it is: class, signature, ``state_dict`` and ``save_pretrained``. It stays compiled after the
    training. Leave ``torch_compile`` out of the ``TrainingArguments``.

    The first training step warms up train and eval, with copies of its own arguments; everything is as before then.
    Losses are those of the trainer without this callback.

    Args:
        modules: names in ``model.named_modules()`` to compile; None compiles the model itself.
        backend: as of ``torch.compile``.
        warmup: whether to compile eval with the first training step; without, the first validation loop compiles it.
        dynamic_batch: whether to compile for any batch size of at least two from the start, so that a last batch that
            is smaller compiles nothing. Without, the second size compiles once more.
        **compile_options: of ``torch.compile``: ``dynamic``, ``fullgraph``, ``mode``, ``options``.

    Attributes:
        phases: graphs and stalls: ``phases.all``, and ``phases.table()`` as text.

    Raises:
        OptionError: an option that ``torch.compile`` doesn't have. When the trainer is made: a name of ``modules`` is
            not there, or the model has been wrapped by ``torch.compile``.
        MissingLibraryError: on import; transformers isn't there.

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
            modules,
            warm=warmup,
            dynamic_batch=dynamic_batch,
            options={"backend": backend, **compile_options},
            train_only=_train_only(),
        )

    @property
    def phases(self) -> Phases:
        """Graphs and stalls, loop by loop."""
        return self._compiling.phases

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Compiles in place."""
        self._compiling.ensure(model, lambda _: [""])

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Compiles, if the callback was added later."""
        self._compiling.ensure(model, lambda _: [""])
        self.phases.mark()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.phases.mark()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a batch of several that make a step."""
        self.phases.step(TRAIN)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step."""
        self.phases.step(TRAIN)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the loop."""
        self._compiling.check_called()
        self.phases.end(TRAIN)
        self.phases.mark()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a batch of validation or prediction."""
        self.phases.step("validation")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the loop."""
        self._compiling.check_called()
        self.phases.end("validation")

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Ends the loop."""
        self.phases.end("validation")


def _train_only() -> tuple[str, ...]:
    """What training passes to the model and validation doesn't; transformers 5.24 counts items in both."""
    name = "num_items_in_batch"
    return () if name in Trainer.prediction_step.__code__.co_varnames else (name,)
