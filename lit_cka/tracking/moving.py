"""When an evaluation takes the place of the reference: `MovingReference`, for "previous" and "best"."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from lit_cka.parallel.warning import warn
from lit_cka.reference.reference import BEST, PREVIOUS, ReferenceLike, moves


class MovingReference:
    """Decides after each evaluation whether it is the reference from now on.

    The best one is so by what the trainer's `ModelCheckpoint` monitors, or else its `EarlyStopping`.

    Args:
        reference: that the callback was asked for.
    """

    def __init__(self, reference: ReferenceLike) -> None:
        self._reference = reference if moves(reference) else None
        self._monitor, self._sign, self._best = "", 1.0, math.inf

    def start(self, trainer: pl.Trainer) -> None:
        """Begin a fit.

        Raises:
            ValueError: if there has to be a best evaluation, and nothing says which it is.
        """
        if self._reference is not None and trainer.ckpt_path is not None:
            warn(
                f"Resumed with reference={self._reference!r}: until the next evaluation that takes its place, the "
                "reference is the model as it was resumed."
            )
        if self._reference != BEST:
            return
        monitoring: list[Any] = [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]
        monitoring = [each for each in monitoring if isinstance(each.monitor, str)]
        if not monitoring:
            raise ValueError(
                "Expected the trainer to have a `ModelCheckpoint` or an `EarlyStopping` with `monitor=` for "
                'reference="best", to say which evaluation is the best, but got none.'
            )
        self._monitor, self._best = monitoring[0].monitor, math.inf
        self._sign = -1.0 if monitoring[0].mode == "max" else 1.0

    def takes_place(self, trainer: pl.Trainer) -> bool:
        """Whether the evaluation that has ended becomes the reference; all ranks call it, and get the same."""
        if self._reference is None:
            return False
        if self._reference == PREVIOUS:
            return True
        value = self._sign * float(trainer.callback_metrics.get(self._monitor, math.nan))
        is_better = bool(trainer.strategy.broadcast(value < self._best))
        self._best = value if is_better else self._best
        return is_better
