"""The `CKACallback` that other callbacks read: one that the user has, or one of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl

from lit_cka.functional.jackknife import MIN_SAMPLES
from lit_cka.parallel.warning import warn
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


def warn_of_few_samples(record: Mapping[str, Any], who: str) -> None:
    """Warn that nothing will ever be done, since a measurement is of too few samples for intervals.

    Args:
        record: an entry of the history.
        who: acts by the intervals.
    """
    if record["n"] < MIN_SAMPLES:
        warn(
            f"{who} can't tell for sure how far a layer has changed, and does nothing: an interval takes {MIN_SAMPLES} "
            f"samples, but the {record['stage']} dataloader {record['dataloader']} gives {record['n']}. Pass more."
        )
