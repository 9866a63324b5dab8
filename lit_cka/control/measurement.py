"""The `CKACallback` that other callbacks read: one that the user has, or one of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lit_cka.tracking.callback import CKACallback
from lit_cka.tracking.history import Record, first_series


def tracking_callbacks(trainer: pl.Trainer) -> list[CKACallback]:
    """Returns the trainer's callbacks that track CKA."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [each for each in callbacks if isinstance(each, CKACallback)]


def found_or_added(
    trainer: pl.Trainer, user: pl.Callback, is_right: Callable[[CKACallback], bool], new: Callable[[], CKACallback]
) -> CKACallback:
    """Returns the first of the trainer's CKACallbacks that is right, or a new one, put behind the callback that asks.

    To be called in `setup`: Lightning then goes on with the new one's, and restores its state with that of all others.

    Args:
        trainer: whose callbacks.
        user: the callback that asks.
        is_right: whether one serves.
        new: makes one.
    """
    found = next(filter(is_right, tracking_callbacks(trainer)), None)
    if found is not None:
        return found
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    added = new()
    callbacks.insert(callbacks.index(user) + 1, added)
    return added


def training_records(callback: CKACallback) -> list[Record]:
    """Returns what a CKACallback has measured in training, of its first tracked dataloader, oldest first."""
    return [record for record in first_series(callback.history) if record["stage"] != "test"]
