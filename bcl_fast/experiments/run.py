"""One condition -> one record: train an autoencoder and measure it at chosen steps.

`Condition.seed` decides everything random, in the same way with BCL and without: `torch.manual_seed(seed)` right before
the model is built (on the CPU, encoder first), and a generator of its own, seeded with the same number, for the order
of the images. Two conditions that differ in `config` alone start from equal weights and see equal batches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diagnostics import forces, row_cosine, step_metrics, weight_metrics
from ..environment import devices
from ..layer import BCLLayer
from ..spec import BCLConfig, check_choice, check_number
from .data import DATA_SETS, Images, batches
from .model import Autoencoder

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}
ROW_FACTORS = (1, 1.5, 2, 2.5, 3, 4, 5, 7)  # of every power of ten


@dataclass(frozen=True)
class Condition:
    """What one training run is made of; equal conditions give equal records.

    Raises TypeError or ValueError that names the field, its value and what is allowed.
    """

    data: str  # digits, mnist
    config: BCLConfig | None  # None: a plain nn.Linear, no BCL at all
    steps: int  # >= 1
    seed: int = 0  # >= 0
    features: int = 64  # >= 2
    batch_size: int = 128  # >= 1
    lr: float = 1e-3  # > 0, of Adam
    loss: str = "l1"  # l1, mse
    backend: str | None = None  # of the layer, None: its fastest
    device: str = "cpu"  # one of `environment.devices`, or its type

    def __post_init__(self) -> None:
        check_choice("data", self.data, DATA_SETS)
        check_choice("loss", self.loss, tuple(LOSSES))
        for name, low in (("steps", 1), ("seed", 0), ("features", 2), ("batch_size", 1)):
            check_number(name, getattr(self, name), low=low, integer=True)
        check_number("lr", self.lr, low=0, open_low=True)

    def control(self) -> Condition:
        """The same condition with no BCL at all."""
        return dataclasses.replace(self, config=None, backend=None)


def row_steps(steps: int) -> tuple[int, ...]:
    """The 0-based steps to measure in a run of `steps`: 0 to 10, then in pairs (49, 50) that spread, and the last.

    Pairs, because neighbours are refreshed at multiples of 50: metrics jump between the two.
    """
    marks = (int(factor * 10**power) for power in range(1, 1 + len(str(steps))) for factor in ROW_FACTORS)
    chosen = {*range(11), *(step for mark in marks for step in (mark - 1, mark)), steps - 1}
    return tuple(sorted(step for step in chosen if step < steps))


class Training:
    """One condition being trained, a step at a time.

    `rows` holds one dict per measured step. Its loss, `wt_sim` and BCL metrics belong to the state before that step's
    update, `wt_sim_post` to the state after it; see `diagnostics` for the metrics. Without BCL those of the weight and
    of Adam remain.
    """

    def __init__(self, condition: Condition, images: Images, rows: Collection[int]) -> None:
        if images.name != condition.data:
            raise ValueError(f"images must be those of the condition, {condition.data!r}, got {images.name!r}")
        names = devices()
        check_choice("device", condition.device, tuple(dict.fromkeys([*(n.partition(":")[0] for n in names), *names])))
        self.condition = condition
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self._measured = frozenset(rows)
        self.images = images.to(condition.device)
        self._batches = batches(self.images.train, condition.batch_size, condition.seed)
        torch.manual_seed(condition.seed)
        model = Autoencoder(images.train.shape[1], condition.features, condition.config, condition.backend)
        self.model = model.to(condition.device)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=condition.lr)
        self._loss = LOSSES[condition.loss]

    def step(self) -> dict[str, float] | None:
        """Train on the next batch; the row of this step where it is measured."""
        batch, row = next(self._batches), None
        if self.done in self._measured:
            row = self._measured_update(batch)
            self.rows.append(row)
        else:
            self._backward(batch)
            self._optimizer.step()
        self.done += 1
        return row

    def _backward(self, batch: Tensor) -> Tensor:
        """Leave the gradients, with BCL pull the weight too; the loss."""
        loss = self._loss(self.model(batch), batch)
        self._optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def _measured_update(self, batch: Tensor) -> dict[str, float]:
        """The same update, looked at on the way; only such a step pays for observing."""
        encoder, records = self.model.encoder, []
        before = self.model.encoder_weight.clone()
        with encoder.observe(records.append) if isinstance(encoder, BCLLayer) else nullcontext():
            loss = self._backward(batch)
        pulled = self.model.encoder_weight.clone()
        self._optimizer.step()
        after = self.model.encoder_weight
        return {
            "step": self.done,
            "loss": loss.item(),
            **(step_metrics(records[0]) if records else weight_metrics(before)),
            "wt_sim_post": row_cosine(after),
            **forces(encoder.weight.grad, before, pulled, after),
        }

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """How the model in its present state serves the images it was not trained on."""
        images = self.images.held_out
        reconstruction = self.model(images)
        return {
            "l1": F.l1_loss(reconstruction, images).item(),
            "mse": F.mse_loss(reconstruction, images).item(),
            "firing_features": int(self.model.fires(images).sum()),
        }

    def record(self) -> dict[str, Any]:
        """Everything about this run as plain values: condition, backend, what was done and measured."""
        return {
            "condition": dataclasses.asdict(self.condition),
            "backend": getattr(self.model.encoder, "backend", None),
            "steps_done": self.done,
            "interrupted": self.done < self.condition.steps,
            "rows": self.rows,
            "held_out": self.held_out(),
        }


def run(
    condition: Condition,
    images: Images,
    rows: Collection[int] | None = None,
    on_row: Callable[[dict[str, float]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train one condition and return its record; `on_row` is called with each row as it is measured.

    `rows` are the steps to measure, None: `row_steps`. A KeyboardInterrupt ends the run early, marked in the record.
    """
    training = Training(condition, images, row_steps(condition.steps) if rows is None else rows)
    advance([training], lambda new: None if new[0] is None else on_row(new[0]))
    return training.record()


def advance(trainings: list[Training], on_step: Callable[[list[dict[str, float] | None]], None]) -> None:
    """Train side by side, a step of each in turn and then `on_step` with their rows of it, as long as the first is to.

    A KeyboardInterrupt ends it early.
    """
    try:
        for _ in range(trainings[0].condition.steps):
            on_step([training.step() for training in trainings])
    except KeyboardInterrupt:
        pass  # what is done stands in the trainings


# --- Records on disk --------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` only where the block ends without an error."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all; NaN and Inf, which JSON lacks, become null."""
    with replacing(path) as part:
        part.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
