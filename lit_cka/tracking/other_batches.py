"""Whether features of samples depend on how batches are put together, where that differs: `OtherBatches`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_cka.parallel.warning import warn
from lit_cka.samples.counting import DataRanks, any_rank
from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.tracking.recording_pass import RecordingPass
from lit_cka.tracking.repetition import copied_batch, lowest_cka
from lit_cka.tracking.tracker import Tracker

_MOST = 4  # checks: a batch may be like the recorded one by chance
_FEWEST = 3  # samples that say something
_LOWEST = 1 - 1e-4  # a CKA that rounding in half precision, which depends on the size of a batch, leaves


class OtherBatches:
    """Has the reference run on a few batches that were put together otherwise in the recording, and compares the rows.

    That is where the data are shuffled, or come in other sizes or on another number of ranks. Of several ranks, all
    have to run a step as often: at the end of a pass they agree that checks are due, and make one on their first
    batches in each of the next passes.
    """

    def __init__(self) -> None:
        self._num_left = _MOST
        self._is_agreed = False  # by several ranks
        self._has_others = False
        self._has_warned = False
        self._batch: Any = None

    def begin(
        self, tracker: Tracker, samples: BatchSamples, batch: Any, batch_idx: int, dataloader: int, ranks: DataRanks
    ) -> None:
        """Keep a copy of a batch, before the step may change it, if the check is to be made on it."""
        self._batch = None
        recorded = tracker.recorded(dataloader)
        if not self._num_left or recorded is None:
            return
        is_other = len(samples) >= _FEWEST and not recorded.has(samples)
        self._has_others = self._has_others or is_other
        if is_other if ranks.size == 1 else (self._is_agreed and batch_idx == 0):
            self._batch = copied_batch(batch)
            self._num_left -= 1

    @property
    def is_due(self) -> bool:
        """Whether the check is to be made on the batch that has begun."""
        return self._batch is not None

    def check(
        self,
        tracker: Tracker,
        samples: BatchSamples,
        dataloader: int,
        recording_pass: RecordingPass,
        repeat: Callable[[Any], None],
    ) -> None:
        """Warn if the reference gives other rows for the batch than were recorded of its samples.

        Args:
            tracker: that has the recording.
            samples: of the batch.
            dataloader: the number of its dataloader.
            recording_pass: in which the live model plays the reference.
            repeat: runs the step on a batch, unnoticed.
        """
        batch, self._batch = self._batch, None
        features = recording_pass.features_of(batch, dataloader, repeat)
        recorded = tracker.recorded(dataloader)
        pairs = {} if recorded is None else recorded.pairs_of(samples, features)
        name, score = lowest_cka({name: pair for name, pair in pairs.items() if len(pair[0]) >= _FEWEST})
        if name is not None and score < _LOWEST and not self._has_warned:
            self._has_warned = True
            warn(
                "What the model gives for a sample depends on the other samples of its batch (statistics of the batch, "
                "padding to the longest one), and they are others than those that the reference was recorded with "
                "(shuffled, in other sizes or on other ranks): an unchanged model would get a CKA of "
                f"{score:.4f} in layer {name!r} on such a batch, not 1. Keep the batches as they are in every pass."
            )

    def end_pass(self, ranks: DataRanks) -> None:
        """Agree on whether checks are due; every rank has to call it."""
        if ranks.size > 1 and not self._is_agreed:
            self._is_agreed = any_rank(self._has_others, ranks)
