"""One condition -> one record: train an autoencoder and measure it at chosen steps.

`Condition.seed` decides everything random, in the same way with BCL and without: `torch.manual_seed(seed)` right before
the model is built (on the CPU, encoder first), and a generator of its own, seeded with the same number, for the order
of the images. Two conditions that differ in `config` alone start from equal weights and see equal batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attach import attach_bcl
from ..diagnostics import force_norms, forces, row_cosine, step_metrics
from ..environment import device_types, devices
from ..layer import BCLLayer
from ..losses import activation_entropy_loss, weight_similarity_loss
from ..records import replacing, trusting
from ..spec import BCLConfig, check_choice, check_number
from .data import DATA_SETS, Images, batches
from .model import Autoencoder

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}
CHOICES = {
    "loss": tuple(LOSSES),
    "inputs": ("raw", "centered"),
    "activation": ("relu", "none"),
    "diversity": ("none", "weight_similarity", "activation_entropy"),
}
UNTOUCHED = BCLConfig(som_lr=0, gradient_mask="none")  # competition that is observed and changes nothing
SHOWN_IMAGES = 16
SNAPSHOT = ("step", "win_rate", "gradient", "pull", "adam", "image_coverage", "weight", "images", "reconstruction")
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
    eps: float = 1e-8  # > 0, of Adam
    loss: str = "l1"  # l1, mse
    inputs: str = "raw"  # raw, centered: the encoder sees images minus the mean training image
    activation: str = "relu"  # relu, none
    diversity: str = "none"  # none, weight_similarity, activation_entropy: a term added to the loss (`losses`)
    diversity_weight: float = 0.0  # >= 0, what the term is multiplied with
    resample_every: int = 0  # >= 0, steps after which features that fire for no training image are redrawn; 0 = never
    backend: str | None = None  # of the layer, None: its fastest
    device: str = "cpu"  # one of `environment.devices`, or its type

    def __post_init__(self) -> None:
        check_choice("data", self.data, DATA_SETS)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name, low in (("steps", 1), ("seed", 0), ("features", 2), ("batch_size", 1), ("resample_every", 0)):
            check_number(name, getattr(self, name), low=low, integer=True)
        for name in ("lr", "eps"):
            check_number(name, getattr(self, name), low=0, open_low=True)
        check_number("diversity_weight", self.diversity_weight, low=0)

    def control(self) -> Condition:
        """The same condition with no BCL at all."""
        return dataclasses.replace(self, config=None, backend=None)


def row_steps(steps: int) -> tuple[int, ...]:
    """The 0-based steps to measure in a run of `steps`: 0 to 10, then in pairs (49, 50) that spread, and the last.

    Pairs, because neighbors are refreshed at multiples of 50: metrics jump between the two.
    """
    marks = (int(factor * 10**power) for power in range(1, 1 + len(str(steps))) for factor in ROW_FACTORS)
    chosen = {*range(11), *(step for mark in marks for step in (mark - 1, mark)), steps - 1}
    return tuple(sorted(step for step in chosen if step < steps))


class Training:
    """One condition being trained, a step at a time.

    `rows` holds one dict per measured step. Its loss, `wt_sim` and BCL metrics belong to the state before that step's
    update, `wt_sim_post` to the state after it, `mean_loss` is the mean over the steps since the row before; see
    `diagnostics` for the metrics. A network without BCL is measured as if its features competed, with fresh neighbors.
    """

    def __init__(self, condition: Condition, images: Images, rows: Collection[int]) -> None:
        if images.name != condition.data:
            raise ValueError(f"images must be those of the condition, {condition.data!r}, got {images.name!r}")
        check_choice("device", condition.device, tuple(dict.fromkeys([*device_types(), *devices()])))
        self.condition = condition
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self._measured = frozenset(rows)
        self.images = images.to(condition.device)
        self._batches = batches(self.images.train, condition.batch_size, condition.seed)
        self._redraws = torch.Generator().manual_seed(condition.seed)
        torch.manual_seed(condition.seed)
        model = Autoencoder(
            images.train.shape[1],
            condition.features,
            condition.config,
            condition.backend,
            linear=condition.activation == "none",
            center=images.train.mean(dim=0) if condition.inputs == "centered" else None,
        )
        self.model = model.to(condition.device)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=condition.lr, eps=condition.eps, fused=True)
        self._loss = LOSSES[condition.loss]
        self._summed_loss, self._summed_steps = torch.zeros((), device=condition.device), 0
        self._features: dict[str, list[Tensor]] = {}
        self._rescue_target: Tensor | None = None

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
        every = self.condition.resample_every
        if every and self.done % every == 0:
            self.model.redraw(~self.model.fires(self.images.train), self._optimizer, self._redraws)
        return row

    def _backward(self, batch: Tensor) -> Tensor:
        """Leave the gradients, with BCL pull the weight too; the loss without its diversity term."""
        activation = self.model.encode(batch)
        loss = self._loss(self.model.decode(activation), batch)
        diversity = self.condition.diversity
        if diversity == "weight_similarity":
            term = weight_similarity_loss(self.model.encoder.weight)
        elif diversity == "activation_entropy":
            term = activation_entropy_loss(activation)
        self._optimizer.zero_grad()
        (loss if diversity == "none" else loss + self.condition.diversity_weight * term).backward()
        loss = loss.detach()
        self._summed_loss += loss
        self._summed_steps += 1
        return loss

    @contextmanager
    def _observed(self) -> Iterator[list[Any]]:
        """A list that gets the `reference.Record` of the training step made within this block."""
        plain = not isinstance(self.model.encoder, BCLLayer)
        handle = attach_bcl(self.model, "encoder", config=UNTOUCHED) if plain else None
        records: list[Any] = []
        with self.model.encoder.observe(records.append):
            yield records
        if handle is not None:
            handle.remove()

    def _measured_update(self, batch: Tensor) -> dict[str, float]:
        """The same update, observed; only such a step pays for it."""
        before = self.model.encoder_weight.clone()
        with self._observed() as records:
            loss = self._backward(batch)
        record = records[0]
        pulled = self.model.encoder_weight.clone()
        gradient = self.model.encoder.weight.grad
        self._optimizer.step()
        after = self.model.encoder_weight
        norms = force_norms(gradient, before, pulled, after)
        for name, values in dict(norms, win_rate=record.win_rate, image_coverage=record.image_coverage).items():
            self._features.setdefault(name, []).append(values.cpu())
        self._rescue_target = record.rescue_target
        mean_loss = self._summed_loss.item() / self._summed_steps
        self._summed_loss.zero_()
        self._summed_steps = 0
        return {
            "step": self.done,
            "loss": loss.item(),
            "mean_loss": mean_loss,
            **step_metrics(record),
            "wt_sim_post": row_cosine(after),
            **forces(norms),
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

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """What pictures need in addition to the record, on the CPU.

        Of every measured step: `step` [rows], `win_rate`, `gradient`, `pull` and `adam` (norms) [rows, D],
        `image_coverage` [rows, B]. As they are now: `weight` [D, pixels], and held-out `images` [16, pixels] with their
        `reconstruction`. `rescue_target` [D, pixels] is that of the last measured step.
        """
        images = self.images.held_out[:SHOWN_IMAGES]
        tensors = {name: torch.stack(values) for name, values in self._features.items()}
        tensors["step"] = torch.tensor([row["step"] for row in self.rows])
        tensors |= {"weight": self.model.encoder_weight, "images": images, "reconstruction": self.model(images)}
        if self._rescue_target is not None:
            tensors["rescue_target"] = self._rescue_target
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

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


def trained(condition: Condition, images: Images, rows: Collection[int]) -> Training:
    """One condition trained to its end, or to a KeyboardInterrupt, and measured at the steps `rows`."""
    training = Training(condition, images, rows)
    advance([training], lambda new: None)
    return training


def advance(trainings: list[Training], on_step: Callable[[list[dict[str, float] | None]], None]) -> None:
    """Train side by side, a step of each in turn and then `on_step` with their rows of it, as long as the first is to.

    A KeyboardInterrupt ends it early.
    """
    try:
        for _ in range(trainings[0].condition.steps):
            on_step([training.step() for training in trainings])
    except KeyboardInterrupt:
        pass  # the trainings hold what is done


def write_snapshots(path: Path, snapshots: Mapping[str, Any]) -> None:
    """Write tensors by name, completely or not at all; `torch.load(path, weights_only=True)` reads them."""
    with replacing(path) as part, part.open("wb") as file:
        torch.save(dict(snapshots), file)


def read_snapshots(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_snapshots` wrote; `remedy` says what to do where there is something else."""
    with trusting(path, remedy):
        return dict(torch.load(path, weights_only=True))


def check_record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a run as it was read from a file; raises where what was measured is not numbers."""
    for name, number in (item for row in (*record["rows"], record["held_out"]) for item in row.items()):
        if not isinstance(number, (int, float, type(None))):
            raise TypeError(f"{name} must be a number, got {number!r}")
    return record


def check_snapshot(tensors: Any, path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of `Training.snapshot`, as they were read from `path`."""
    with trusting(path, remedy):
        for name in SNAPSHOT:
            if not torch.is_tensor(tensors[name]):
                raise TypeError(f"{name} must be a tensor, got a {type(tensors[name]).__name__}")
        return tensors
