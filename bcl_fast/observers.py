"""Who looks at a layer's training steps: callbacks of `BCLLayer.observe`, and the meters of monitors and frameworks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .reference import Record


class Observer:
    """Is told of every backward that brought a layer a pull; `due` says whether the next one is to be recorded."""

    due = True

    def __init__(self, callback: Callable[[Record], None]) -> None:
        self.callback = callback

    def consumed(self, record: Record | None) -> None:
        """Called after each backward, and after its pull where no optimizer is bound; None where nothing was due."""
        if record is not None:
            self.callback(record)

    def pulled(self, move: Tensor) -> None:
        """Called where due, in the step of a bound optimizer, with what its pull has added to the weight [D, N]."""


def call_all(calls: Iterable[Callable[[], None]]) -> None:
    """Make every call, also after one that raises; then raise what the first of those did."""
    errors = []
    for call in calls:
        try:
            call()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
