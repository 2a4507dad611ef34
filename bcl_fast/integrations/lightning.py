"""`BCLCallback` for Lightning: `Trainer(callbacks=[BCLCallback()])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the older package of the same classes
    from pytorch_lightning import Callback

from ..bound import holders
from ..layer import BCLLayer
from ..meter import Measured
from ..monitor import Monitor
from .start import bind_layers, check_arguments


class BCLCallback(Callback):
    """Binds the BCL layers of a LightningModule to its optimizers, and logs what they do to the trainer's loggers.

    They are bound as the training starts, when the optimizers are there and a checkpoint is loaded, and those that an
    optimizer gets later (BaseFinetuning) as the next batch begins. Accumulation, clipping, precisions and several
    optimizers are Lightning's affair, as for any module.

    Args:
        every: steps of a layer from one that is logged to the next, >= 1; 0 logs nothing.
        out: a folder to write to as `bcl_fast.Monitor` does, for `python -m bcl_fast report OUT`.
    """

    def __init__(self, every: int = 100, out: str | Path | None = None) -> None:
        check_arguments(every, out)
        self.every, self.out = every, out
        self._monitor: Monitor | None = None
        self._without: dict[str, BCLLayer] = {}  # that no optimizer holds yet

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._without = bind_layers(pl_module, trainer.optimizers)

        def log(measured: Measured) -> None:
            numbers = measured.named("bcl/")
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

        self._end()
        if self.every != 0:
            self._monitor = Monitor(pl_module, trainer.optimizers, self.every, self.out, callback=log).__enter__()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for name, optimizer in holders(self._without, trainer.optimizers).items() if self._without else ():
            self._without.pop(name).bind_optimizer(optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(exception)

    def _end(self, *error: BaseException) -> None:
        if self._monitor is not None:
            self._monitor.__exit__(*error)
            self._monitor = None
