"""One validation or test that is tracked, or in which the reference is recorded: `TrackedEvaluation`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.samples.samples import EvaluationSamples, content_keys
from lit_cka.tracking.dataloaders import tracked_dataloaders
from lit_cka.tracking.evaluation_loops import changed_by_steps, is_last_batch, repeat_step, unnoticed_step
from lit_cka.tracking.history import Record, Stage
from lit_cka.tracking.intervals import Intervals
from lit_cka.tracking.options import TrackingOptions
from lit_cka.tracking.preserved_state import preserved_state
from lit_cka.tracking.recording_pass import RecordingPass
from lit_cka.tracking.tracked_model import TrackedModel
from lit_cka.tracking.tracker import LayerScore


class TrackedEvaluation:
    """Follows the trainer's evaluation loop batch by batch.

    Args:
        trainer: whose loop is about to run.
        callback: that follows it.
        model: the live model with its reference.
        samples: what knows which samples a batch holds.
        stage: "validate" or "test".
        options: of the callback.
        recording_pass: if the reference is recorded, rather than compared with.
        again: makes another one, to see what the reference gives for a batch; None where nothing plays it any more.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        callback: pl.Callback,
        model: TrackedModel,
        samples: EvaluationSamples,
        stage: Stage,
        options: TrackingOptions,
        recording_pass: RecordingPass | None,
        again: Callable[[], RecordingPass] | None = None,
    ) -> None:
        self._trainer, self._model, self._samples, self._stage = trainer, model, samples, stage
        self._callback, self._max_batches = callback, options.max_batches
        self._pass, self._again = recording_pass, again
        self._batch: BatchSamples | None = None
        self.dataloaders, total = tracked_dataloaders(trainer, stage, options.dataloaders, options.min_num_samples)
        samples.begin(self.dataloaders, options.max_batches)
        model.tracker.open(stage, total, samples.ranks, record=recording_pass is not None)

    @property
    def records(self) -> bool:
        """Whether the reference is recorded, rather than compared with."""
        return self._pass is not None

    def begin_batch(self, batch: Any, batch_idx: int, dataloader: int) -> None:
        """Watch the step on this batch, if it is tracked."""
        self._batch = None
        if dataloader not in self.dataloaders:
            return
        if self._max_batches is not None and batch_idx >= self._max_batches:
            return
        self._batch = self._samples.of_batch(dataloader, batch_idx, batch)
        tracker = self._model.tracker
        looks = tracker.looks_at_content(batch_idx, self._model.module.device)
        if self._batch.kind == "index" and (looks or tracker.needs_content(dataloader, self._batch)):
            self._batch.content = content_keys(batch, len(self._batch))
        if tracker.has_changed(dataloader, self._batch):
            self._batch = None
            return
        num_samples = len(self._batch) if self._batch.kind == "index" else None
        if self._pass is not None:
            self._pass.begin_batch(batch, dataloader, num_samples)
        else:
            if self._again is not None:
                ranks = self._samples.ranks
                self._model.other_batches.begin(self._model.tracker, self._batch, batch, batch_idx, dataloader, ranks)
            self._model.tracker.begin(dataloader, batch, num_samples)

    def end_batch(self, batch_idx: int, dataloader: int) -> None:
        """Take what the step since `begin_batch` showed."""
        repeat = partial(repeat_step, self._trainer, self._callback, batch_idx=batch_idx, dataloader=dataloader)
        if self._pass is not None:
            is_last = is_last_batch(self._trainer)
            self._pass.end_batch(self._batch, dataloader, is_last=is_last, repeat=repeat)
        elif self._batch is not None:
            self._model.tracker.compare(self._batch)
            if self._again is not None and self._model.other_batches.is_due:
                held = changed_by_steps(self._trainer, self._callback)
                with preserved_state(held), unnoticed_step(self._trainer):
                    self._model.other_batches.check(self._model.tracker, self._batch, dataloader, self._again(), repeat)

    def scores(self) -> dict[int, dict[str, LayerScore]]:
        """Return the score of every layer, by dataloader; every rank has to call it."""
        scores = {}
        for number in self.dataloaders:
            self._samples.resolve(number)
            scores[number] = self._model.tracker.scores(number)
        self._model.other_batches.end_pass(self._samples.ranks)
        return scores

    def finish_recording(self) -> None:
        """Conclude the recording; every rank has to call it."""
        assert self._pass is not None
        self._pass.finish()
        self._model.tracker.conclude_recording()

    def close(self) -> None:
        """Leave no hook behind, and put back what a recording has changed."""
        if self._pass is not None:
            self._pass.finish()
        self._model.tracker.close()


def record_of(
    trainer: pl.Trainer,
    stage: Stage,
    dataloader: int,
    layers: dict[str, LayerScore],
    intervals: Intervals | None,
    *,
    with_ranks: bool = False,
) -> Record:
    """Return the entry of the history for the scores of one dataloader, with intervals if there are to be some."""
    record = Record(
        step=trainer.global_step,
        epoch=trainer.current_epoch,
        stage=stage,
        dataloader=dataloader,
        n=min(layer.n for layer in layers.values()),
        scores={name: layer.cka for name, layer in layers.items()},
    )
    if intervals is not None:
        record.update(intervals.of(f"{stage} {dataloader}", layers))  # type: ignore[typeddict-item]
        if with_ranks:
            ranks = {name: layer.sampled.rank for name, layer in layers.items() if layer.sampled is not None}
            record["rank"] = {name: rank for name, rank in ranks.items() if rank == rank}
    return record
