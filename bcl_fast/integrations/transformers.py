"""`BCLCallback` for the Trainer of transformers: `trainer.add_callback(BCLCallback(trainer))`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ..meter import Measured
from ..monitor import Monitor
from .start import bind_layers, check_arguments


class BCLCallback(TrainerCallback):
    """Binds the BCL layers of a Trainer's model to its optimizer, and logs what they do by `trainer.log`.

    They are bound as the training starts, to the optimizer inside of accelerate's. The numbers are in
    `trainer.state.log_history` and wherever the Trainer reports to. A `train()` that raises has no end for callbacks:
    its steps are looked at until the next `train()`.

    Args:
        trainer: the one it is added to: callbacks cannot log by themselves.
        every: steps of a layer from one that is logged to the next, >= 1; 0 logs nothing.
        out: a folder to write to as `bcl_fast.Monitor` does, for `python -m bcl_fast report OUT`.
    """

    def __init__(self, trainer: Trainer, every: int = 100, out: str | Path | None = None) -> None:
        check_arguments(every, out)
        self.trainer, self.every, self.out = trainer, every, out
        self._monitor: Monitor | None = None
        self._numbers: dict[str, float] = {}  # of the step that is under way

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model, optimizer = others["model"], others["optimizer"]
        bind_layers(model, optimizer)
        self._end()
        if self.every != 0:
            self._monitor = Monitor(model, optimizer, self.every, self.out, callback=self._take).__enter__()

    def _take(self, measured: Measured) -> None:
        self._numbers |= measured.named("bcl/")

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._numbers:
            numbers, self._numbers = self._numbers, {}
            due = control.should_log
            self.trainer.log(numbers)
            control.should_log = due  # which a log takes back, and with it the Trainer's own of this step

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._numbers = {}
        if self._monitor is not None:
            self._monitor.__exit__()
            self._monitor = None
