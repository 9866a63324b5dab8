"""When the reference is recorded, and by which run of Lightning's loops: `Recorder`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_cka.features.sharded_modules import is_sharded
from lit_cka.parallel.ranks import agreed
from lit_cka.parallel.warning import warn
from lit_cka.reference.reference import moves, starts_from_initial
from lit_cka.reference.storage import TrainingStart
from lit_cka.samples.drawing import unread
from lit_cka.samples.sampler_indices import evaluated_loaders
from lit_cka.samples.samples import EvaluationSamples
from lit_cka.tracking.dataloaders import tracked_dataloaders
from lit_cka.tracking.evaluation import TrackedEvaluation
from lit_cka.tracking.evaluation_loops import call_before_runs, changed_by_steps, unnoticed
from lit_cka.tracking.history import Stage
from lit_cka.tracking.options import TrackingOptions
from lit_cka.tracking.preserved_state import preserved_state
from lit_cka.tracking.recording_pass import RecordingPass
from lit_cka.tracking.tracked_model import TrackedModel


class Recorder:
    """Has the reference recorded before it is compared with.

    That is a run of the trainer's own loop, over the whole set, that nobody else notices: before the first step, or
    before an evaluation of data that have not been there yet.

    Attributes:
        start: what the training began with.
        model: the live model with its reference; None before `prepare`.
        is_recording_due: whether the evaluation that starts next, or runs, is the reference's.
        is_left_out: whether it is not tracked, since some rank takes no part in it.

    Args:
        callback: for whom such a run is.
        options: of the callback.
        is_tracked: given the trainer and the stage, whether the evaluation that is about to run is tracked.
    """

    def __init__(
        self, callback: pl.Callback, options: TrackingOptions, is_tracked: Callable[[pl.Trainer, Stage], bool]
    ) -> None:
        self.start = TrainingStart()
        self.model: TrackedModel | None = None
        self.is_recording_due = self.is_left_out = False
        self._callback, self._options, self._is_tracked = callback, options, is_tracked
        self._samples: EvaluationSamples
        self._pass: RecordingPass | None = None
        self._undo = ExitStack()  # what was done to Lightning's loops

    def set_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Get ready for a fit, a validation or a test, before weights are loaded for it."""
        if stage == "fit":
            self.start.start_fit()
        if self.model is not None and self.model.module is not pl_module:
            if stage == "fit":  # a new training
                self.model = None
                self.start.forget()
            else:  # say, the best checkpoint loaded into another module: compare it with what the training began from
                self.model = self.model.of(pl_module)
        is_built = not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model"))
        if stage in self._options.stages and is_built and starts_from_initial(self._options.reference):
            self.start.keep(pl_module)
            self.start.are_live = False
        if stage not in ("fit", *self._options.stages):
            return
        if not self._options.has_probe:
            self._samples = EvaluationSamples(trainer)
            self._samples.watch()
            self._undo.callback(self._samples.close)
        self._undo.callback(call_before_runs(trainer, partial(self.before_run, trainer)))

    def close(self) -> None:
        """Leave Lightning's loops as they were."""
        self.is_recording_due = self.start.are_live = False
        self._undo.close()

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TrackedModel:
        """Find out what the module is compared with, once what is resumed has been loaded."""
        if self.start.is_of_another_training():
            self.model = None
        if self.model is None:
            # A file with the reference may be missing for one process alone, for which the others would wait.
            build = partial(TrackedModel, pl_module, self._options, trainer.default_root_dir)
            self.model = agreed(build)
            reference = self._options.reference
            if moves(reference):  # and is recorded anew: the weights that are resumed are those of an evaluation
                self.start.start_fit()
            is_initial = starts_from_initial(reference) and not moves(reference)
            self.start.find(trainer, pl_module, self.model.recording, is_initial=is_initial)
            self.start.begin(trainer)
            if starts_from_initial(reference):
                self.start.keep(pl_module)
        return self.model

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TrackedModel:
        """Do so before a training, whose hooks may have loaded weights since the last time."""
        if self._has_moved(trainer, pl_module):
            self.start.keep_again(pl_module)
        return self.prepare(trainer, pl_module)

    def has_to_begin_anew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the first step begins from other weights than were recorded; what was recorded is then forgotten.

        Hooks of the module, and of other callbacks, run after this callback's, and may load weights.
        """
        is_anew = self._has_moved(trainer, pl_module)
        if is_anew:
            self.model, self.start.weights = None, None
        self.start.are_live = False
        return is_anew

    def _has_moved(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        is_live = self.start.are_live
        return is_live and trainer.strategy.reduce_boolean_decision(self.start.has_moved(pl_module), all=False)

    def before_run(self, trainer: pl.Trainer, loop: Any) -> None:
        """Record in a run of its own, if the evaluation that is about to run needs it.

        Raises:
            ValueError: on all ranks, if some of them have batches and others none, for a probe or a sharded model.
        """
        stage: Stage = "test" if trainer.testing else "validate"
        is_in_search = self._callback not in trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if self.is_recording_due or is_in_search or not self._is_tracked(trainer, stage):
            return
        # All have to run a model that they share; else, those with batches may evaluate without the others.
        is_joint = is_sharded(trainer.lightning_module) or self._options.has_probe
        if is_joint and self._options.probe_every_n_steps is None:
            _require_batches_on_all_ranks(trainer, loop, stage)
        if self._options.has_probe or trainer.sanity_checking:
            return
        model, limit = self.prepare(trainer, trainer.lightning_module), self._options.max_batches
        loop.setup_data()
        self.is_left_out = self._is_left_out(trainer, loop)
        if self.is_left_out or not model.tracker.can_record:
            return
        self.is_recording_due = self._needs_recording(trainer, loop, stage)
        if not model.tracker.can_record:
            # One batch, to know before the training what would go wrong beside it.
            self.is_recording_due, limit = True, 1
        try:
            if self.is_recording_due:
                with (
                    unread(evaluated_loaders(trainer)),
                    preserved_state(changed_by_steps(trainer, self._callback)),
                    unnoticed(trainer, self._callback, limit),
                ):
                    type(loop).run(loop)
                    self.start.put_back(trainer.lightning_module)
        finally:
            self.is_recording_due = False
            if self._pass is not None:  # before anybody hears of an error, and, say, writes a checkpoint
                self._pass.finish()
                self._pass = None
            if not model.tracker.can_record:
                model.forget_recording(stage)  # or it would be stored, and taken for the recording of all

    def _is_left_out(self, trainer: pl.Trainer, loop: Any) -> bool:
        """Whether some rank has no batches: it leaves out the evaluation, and others would wait for it."""
        if not trainer.strategy.reduce_boolean_decision(loop.skip, all=False):
            return False
        if not trainer.strategy.reduce_boolean_decision(loop.skip, all=True):
            warn("CKACallback leaves out this evaluation: some rank has no batches at all for it, and takes no part.")
        return True

    def _needs_recording(self, trainer: pl.Trainer, loop: Any, stage: Stage) -> bool:
        assert self.model is not None
        options = self._options
        dataloaders, _ = tracked_dataloaders(trainer, stage, options.dataloaders, options.min_num_samples)
        words = {number: self._samples.dataset_words(number) for number in dataloaders}
        # Together, since what follows takes all ranks.
        if trainer.strategy.reduce_boolean_decision(self.model.is_recorded(stage, words), all=True):
            return False
        if starts_from_initial(options.reference):
            self.start.require()
        is_fixed = not self._samples.changing(dataloaders)
        if not trainer.strategy.reduce_boolean_decision(is_fixed, all=True):
            if moves(options.reference):
                raise ValueError(
                    f"Expected the same data at every pass with reference={options.reference!r}, which is what the "
                    "model gave for them in an earlier one, but they differ (augmentation, random crops, a collation "
                    "that draws). Pass fixed batches as `probe=`."
                )
            self.model.run_reference_beside(self.start.to_exchange)
        return self.model.tracker.can_record

    def evaluation(self, trainer: pl.Trainer, stage: Stage) -> TrackedEvaluation:
        """Return what follows the evaluation that starts now."""
        assert self.model is not None
        self._pass = self.model.recording_pass(self.start.to_exchange) if self.is_recording_due else None
        is_there = self.start.are_live or (self.start.weights is not None and not moves(self._options.reference))
        can_repeat = not starts_from_initial(self._options.reference) or is_there
        again = partial(self.model.recording_pass, self.start.to_exchange) if can_repeat else None
        return TrackedEvaluation(
            trainer, self._callback, self.model, self._samples, stage, self._options, self._pass, again
        )


def _require_batches_on_all_ranks(trainer: pl.Trainer, loop: Any, stage: Stage) -> None:
    """Raise on all ranks if some have no batch: Lightning calls no hook there, and the others would wait for them."""
    loop.setup_data()
    if trainer.world_size == 1 or not trainer.strategy.reduce_boolean_decision(loop.skip, all=False):
        return
    if not trainer.strategy.reduce_boolean_decision(loop.skip, all=True):
        raise ValueError(
            f"Expected every rank to have batches to {stage} on, or none, but only some have: all have to run the "
            "model together, and Lightning does not run this loop where there are none. Share the samples out so that "
            "each rank has one at least (a DistributedSampler does), or leave this stage out by `stages=`."
        )
