"""A model that is tracked, its reference, and the tracker that compares both: `TrackedModel`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning.pytorch as pl

from lit_cka.features.layers import select_layers
from lit_cka.features.sharded_modules import is_sharded
from lit_cka.parallel.ranks import agreed
from lit_cka.parallel.warning import warn
from lit_cka.reference.adapters import switch_off_adapters
from lit_cka.reference.exchange import WeightExchange, Weights
from lit_cka.reference.recording import Dataloader, Recording
from lit_cka.reference.reference import PREVIOUS, LiveReference, make_reference, moves, running_copy
from lit_cka.reference.running import RunningReference
from lit_cka.tracking.options import TrackingOptions
from lit_cka.tracking.other_batches import OtherBatches
from lit_cka.tracking.recording_pass import RecordingPass
from lit_cka.tracking.tracker import Tracker


class TrackedModel:
    """The live model with its reference.

    Attributes:
        module: the live model.
        recording: what the reference gave for every sample, as far as it was recorded.
        other_batches: whether features depend on the batch.
        tracker: takes features for the recording, or to compare them with it.

    Args:
        module: the live model.
        options: of the callback.
        folder: where a recording that memory does not hold is put.
        recording: what was recorded of the same reference before; None to begin with nothing.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        options: TrackingOptions,
        folder: str | Path,
        recording: Recording | None = None,
    ) -> None:
        self.module = module
        self._options = options
        self._layer_names = select_layers(module, options.layers)
        self._reference = make_reference(module, options.reference, self._layer_names, options.pooling)
        self._folder = folder
        self.recording = recording or self._new_recording()
        self.other_batches = OtherBatches()
        self.tracker = self._new_tracker(self._reference if isinstance(self._reference, RunningReference) else None)

    def _new_recording(self) -> Recording:
        options = self._options
        max_bytes = options.cache_memory * 2**30
        return Recording(self._layer_names, max_bytes, options.cache_dtype, self._folder, options.how_pooled)

    def _new_tracker(self, running: RunningReference | None) -> Tracker:
        options = self._options
        return Tracker(
            self.module,
            self._layer_names,
            options.pooling,
            self.recording,
            running,
            options.estimator,
            options.debiased,
            options.mask,
            options.intervals,
            options.effective_ranks,
            self._new_recording() if moves(options.reference) else None,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether the live model is spread over ranks, which have to run it together."""
        return is_sharded(self.module)

    @property
    def how_compared(self) -> str:
        """A few words on how the reference came to be, for people."""
        if moves(self._options.reference):
            is_previous = self._options.reference == PREVIOUS
            return f"the model at the {'evaluation before' if is_previous else 'best evaluation so far'}"
        return "recorded before the first step" if self.tracker.can_record else "run beside the model at every pass"

    def is_recorded(self, stage: str, words: Mapping[int, set[int]]) -> bool:
        """Whether the reference's features of these dataloaders are there.

        Args:
            stage: that the dataloaders belong to.
            words: by the number of a dataloader, the second words of the keys of its dataset; empty if not known.
        """
        for number, of_dataset in words.items():
            recorded = self.recording.dataloaders.get(Dataloader(stage, number))
            if recorded is None or not recorded.is_complete or not recorded.is_of(of_dataset):
                return False
        return True

    def recording_pass(self, initial: Weights | None) -> RecordingPass:
        """Return the pass that records the reference.

        Args:
            initial: the weights that the training began with, if the live model has others by now.
        """
        reference, in_step = self._live_reference(initial), self.is_sharded
        build = partial(RecordingPass, self.module, self.tracker, reference, in_step=in_step)
        # What is wrong with shards may be seen by one process alone, for which the others would wait.
        return agreed(build) if in_step and reference.weights is not None else build()

    def _live_reference(self, initial: Weights | None) -> LiveReference:
        if isinstance(self._reference, RunningReference):
            return LiveReference()
        is_initial = self._reference == LiveReference()
        return LiveReference(weights=initial) if is_initial and initial is not None else self._reference

    def run_reference_beside(self, initial: Weights | None) -> None:
        """Have the reference run beside the live model in every pass, since the data differ each time.

        Raises:
            ValueError: if the model can't be copied, or is sharded; the message names `probe=`.
        """
        if not self.tracker.can_record:
            return
        if not isinstance(self._reference, RunningReference):
            if self.is_sharded:
                raise ValueError(f"The model is sharded over ranks and can't be copied, but {_DIFFERS}")
            running = running_copy(self.module, self._layer_names, self._options.pooling)
            reference = self._live_reference(initial)
            if reference.weights is not None:
                WeightExchange(running.module, reference.weights).put_in()
            if reference.adapters_off:
                switch_off_adapters(running.module)
            self.tracker = self._new_tracker(running)
        self.tracker.can_record = False
        warn(
            "The data differ at every pass (augmentation, random crops, a collation that draws): the reference is not "
            "recorded, but runs beside the model each time. The numbers are right all the same, but tracking is nearly "
            "free only where data are fixed in evaluation."
        )

    def of(self, module: pl.LightningModule) -> TrackedModel:
        """Return the same for another live model of the same architecture: it has the same reference."""
        other = TrackedModel.__new__(TrackedModel)
        other.module, other._options, other._layer_names = module, self._options, self._layer_names
        other._reference, other.recording = self._reference, self.recording
        other.other_batches, other._folder = self.other_batches, self._folder
        running = self.tracker.running
        other.tracker = other._new_tracker(None if running is None else running.of(module))
        other.tracker.can_record = self.tracker.can_record
        return other

    def forget_recording(self, stage: str) -> None:
        """Drop what was recorded of a stage's dataloaders."""
        for dataloader in [key for key in self.recording.dataloaders if key.stage == stage]:
            del self.recording.dataloaders[dataloader]


_DIFFERS = (
    "the data differ at every pass, so that the reference would have to run beside it. Pass fixed batches as `probe=`."
)
