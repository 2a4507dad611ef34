"""Every choice the algorithm leaves open (SPEC section 3), validated in one place."""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

EPS = 1e-8  # guards every division of SPEC section 2

CHOICES = {
    "affinity": ("rank", "clamped_cosine", "cosine"),
    "rescue_weighting": ("hard", "soft"),
    "forces": ("decoupled", "coupled"),
    "gradient_mask": ("soft", "winner_take_all", "none"),
    "target_projection": ("none", "orthogonal", "centered"),
    "som_space": ("weight", "offset"),
    "sync": ("global", "local"),
}

PRESETS: dict[str, dict[str, Any]] = {
    # The research document's history in order; "decoupled" is the default configuration.
    "soft-clamp": dict(affinity="clamped_cosine", rescue_weighting="soft", rescue_k=8, forces="coupled"),
    "hard-clamp": dict(affinity="clamped_cosine", rescue_weighting="hard", rescue_k=1, forces="coupled"),
    "hard-rank": dict(affinity="rank", rescue_weighting="hard", rescue_k=1, forces="coupled"),
    "decoupled": dict(affinity="rank", rescue_weighting="hard", rescue_k=5, forces="decoupled"),
}


def check_number(
    name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False, integer: bool = False
) -> float | int:
    """Return `value` as float (or int), or raise an error that names `name`, the value and what is allowed.

    Raises TypeError for the wrong kind of value, ValueError for one out of range.
    """
    kind = "an integer" if integer else "a finite number"
    bounds = f"{'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    allowed: type[Any] = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{name} must be {kind} {bounds}, got {value!r} of type {type(value).__name__}")
    number = int(value) if integer else float(value)
    if not (math.isfinite(number) and low <= number <= high) or (open_low and number == low):
        raise ValueError(f"{name} must be {kind} {bounds}, got {value!r}")
    return number


def listed(names: Iterable[Any]) -> str:
    """Names as the messages of errors have them."""
    return ", ".join(map(repr, names))


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of `allowed`, or raise a ValueError that names all of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {listed(allowed)}, got {value!r}")
    return value


@dataclass(frozen=True)
class BCLConfig:
    """The options of SPEC section 3 under their names there; the defaults are the preset `decoupled`.

    Raises TypeError or ValueError that names the option, its value and what is allowed.
    """

    som_lr: float = 0.005  # >= 0, step size of the SOM pull
    neighborhood_k: int = 8  # >= 1, neighbors per feature (at most D - 1 are used)
    temperature: float = 5.0  # > 0, slope of the competition's sigmoid
    recompute_every: int = 50  # >= 1, steps between neighbor refreshes
    affinity: str = "rank"  # rank, clamped_cosine, cosine
    need_weighting: bool = True  # False: "pure affinity"
    rescue_weighting: str = "hard"  # hard, soft
    rescue_k: int = 5  # >= 0, samples per feature; 0 means all of the batch
    forces: str = "decoupled"  # decoupled, coupled
    gradient_mask: str = "soft"  # soft, winner_take_all, none
    target_projection: str = "none"  # none, orthogonal, centered
    rescue_onset: float = 0.0  # 0 .. 1, rescue only below this win rate; 0 = always
    pull_onset: float = 0.0  # 0 .. 1, pull only below this win rate; 0 = always
    som_space: str = "weight"  # weight, offset
    check_finite: bool = False  # True: NaN, Inf, or rows of x with 0 < |x| < 1e-6 raise; waits for the device
    sync: str = "global"  # global, local: across the ranks of a process group

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for name in ("need_weighting", "check_finite"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        put("som_lr", check_number("som_lr", self.som_lr, low=0))
        put("temperature", check_number("temperature", self.temperature, low=0, open_low=True))
        for name in ("rescue_onset", "pull_onset"):
            put(name, check_number(name, getattr(self, name), low=0, high=1))
        for name, low in (("neighborhood_k", 1), ("recompute_every", 1), ("rescue_k", 0)):
            put(name, check_number(name, getattr(self, name), low=low, integer=True))

    @property
    def statistics(self) -> tuple[Any, ...]:
        """`StatisticsOptions`: those on which the statistics of a forward depend, in the order of their fields here."""
        return StatisticsOptions(*(getattr(self, name) for name in StatisticsOptions._fields))

    @property
    def couples(self) -> bool:
        """Whether the gradient mask depends on the whole batch (`coupled` of SPEC section 3, unless G is replaced)."""
        return self.forces == "coupled" and self.gradient_mask == "soft"

    def replace(self, **options: Any) -> BCLConfig:
        """A copy with some options changed; an unknown option is a TypeError that lists the known ones."""
        return BCLConfig.from_dict({**self.to_dict(), **options})

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, as plain Python values: `from_dict(to_dict())` is the same config."""
        return dataclasses.asdict(self)

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        defaults = BCLConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BCLConfig:
        """The config with these options; the ones not given keep their default."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"unknown option {listed(unknown)}; known options: {', '.join(known)}")
        return cls(**options)

    @classmethod
    def preset(cls, name: str, **options: Any) -> BCLConfig:
        """One of `PRESETS` by name, with `options` changed on top."""
        check_choice("preset", name, tuple(PRESETS))
        return cls.from_dict({**PRESETS[name], **options})


# What the layer applies by itself: its state, its pull, its ranks. The statistics of a forward depend on the rest.
_OF_THE_LAYER = ("som_lr", "neighborhood_k", "target_projection", "som_space", "sync")
STATISTICS_FIELDS = tuple(field for field in dataclasses.fields(BCLConfig) if field.name not in _OF_THE_LAYER)
_named_tuple: Any = collections.namedtuple  # of which mypy wants the fields written out, as they are in BCLConfig
StatisticsOptions = _named_tuple("StatisticsOptions", [field.name for field in STATISTICS_FIELDS])
