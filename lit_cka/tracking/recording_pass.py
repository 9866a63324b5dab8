"""The pass of the trainer's own evaluation loop in which the reference is recorded: `RecordingPass`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lit_cka.features.extractor import not_run
from lit_cka.parallel.warning import warn
from lit_cka.reference.adapters import adapters_off
from lit_cka.reference.exchange import WeightExchange
from lit_cka.reference.reference import LiveReference
from lit_cka.samples.random_states import preserved_rng
from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.tracking.preserved_state import preserved_state
from lit_cka.tracking.repetition import copied_batch, lowest_score
from lit_cka.tracking.tracker import Tracker


class RecordingPass:
    """Records what the reference gives for every batch, and leaves the training as it was before.

    The live model plays the reference: as it is, with other weights in it, or without its adapters. What else a step
    changes is put back by whoever has the loop run.

    Args:
        pl_module: the live model.
        tracker: that takes the features.
        reference: how the live model plays the reference; None if another model does.
        in_step: whether all processes have to run the model as often, since each has a part of it.
    """

    def __init__(
        self, pl_module: pl.LightningModule, tracker: Tracker, reference: LiveReference | None, *, in_step: bool = False
    ) -> None:
        self._module = pl_module
        self._in_step = in_step
        self._tracker = tracker
        self._reference = reference or LiveReference()
        self._exchange = None if self._reference.weights is None else WeightExchange(pl_module, self._reference.weights)
        self._step = ExitStack()
        self._first_batch: Any = None
        self._num_samples: int | None = None
        self._is_checked = False

    def begin_batch(self, batch: Any, dataloader: int, num_samples: int | None = None) -> None:
        """Have the live model play the reference from here on.

        Args:
            batch: it is copied, if it is the first.
            dataloader: the number of its dataloader.
            num_samples: that it holds, if known.
        """
        self._num_samples = num_samples
        if self._exchange is not None:
            self._exchange.put_in()
        if self._reference.adapters_off:
            self._step.enter_context(adapters_off(self._module))
        if not self._is_checked and self._tracker.running is None:
            self._first_batch = copied_batch(batch)
        self._tracker.begin(dataloader, batch, num_samples)

    def end_batch(
        self, samples: BatchSamples | None, dataloader: int, *, is_last: bool, repeat: Callable[[Any], None]
    ) -> None:
        """Record the batch; after the last one the live model is itself again.

        Args:
            samples: of the batch; None if it is not tracked.
            dataloader: the number of its dataloader.
            is_last: whether it is the last batch of all.
            repeat: runs the step on a batch once more.
        """
        try:
            if samples is not None:
                shown = self._tracker.take()
                if self._module.trainer.sanity_checking:
                    problems = {name: _explained(name, text) for name, text in shown.problems.items()}
                    shown = shown._replace(problems=problems)
                self._tracker.record(samples, shown)
                if not self._is_checked:
                    self._is_checked = True
                    self._check_that_it_repeats(shown.live, dataloader, repeat)
        finally:
            self._step.close()
            if is_last:
                self._put_back_weights()

    def features_of(self, batch: Any, dataloader: int, repeat: Callable[[Any], None]) -> dict[str, Tensor]:
        """Return what the reference gives for a batch by itself, by layer; nothing is recorded.

        Args:
            batch: it is used up.
            dataloader: the number of its dataloader.
            repeat: runs the step on a batch.
        """
        self._is_checked = True
        with self._tracker.alone(), self._tracker.as_reference():
            try:
                self.begin_batch(batch, dataloader)
                repeat(batch)
            finally:
                shown = self._tracker.take()
                self.finish()
        return self._tracker.of_reference(shown)

    def finish(self) -> None:
        """Make the live model itself again; also after a pass that failed."""
        self._step.close()
        self._put_back_weights()

    def _put_back_weights(self) -> None:
        if self._exchange is not None:
            self._exchange.put_back()

    def _check_that_it_repeats(
        self, features: dict[str, Tensor], dataloader: int, repeat: Callable[[Any], None]
    ) -> None:
        """Warn if the same batch gives other features the second time: then an unchanged model can't reach 1."""
        batch, self._first_batch = self._first_batch, None
        can_repeat = batch is not None
        if self._in_step:
            can_repeat = self._module.trainer.strategy.reduce_boolean_decision(can_repeat, all=True)
        if not can_repeat:
            return
        with self._tracker.alone(), preserved_rng(), preserved_state([self._module]):
            self._tracker.begin(dataloader, batch, self._num_samples)
            repeat(batch)
            again = self._tracker.take().live
        name, score = lowest_score(features, again)
        if name is not None:
            warn(
                "The reference's model does not give the same features for the same batch twice, in evaluation: it "
                "draws random numbers, runs in train mode, or depends on something besides its inputs. An unchanged "
                f"model would get a CKA of {score:.4f} in layer {name!r} on the first batch, not 1 (but where hooks or "
                "the step set the seed for every pass): read all scores against that."
            )


def _explained(name: str, problem: str) -> str:
    """The problem of a layer, with what may be behind it where the trainer says that this is a sanity check."""
    return f"{problem} {_SANITY_CHECK}" if problem.startswith(not_run(name)) else problem


_SANITY_CHECK = (
    "The reference is recorded in a run of the validation in which `trainer.sanity_checking` is true: does the step "
    "return early then? It has to run the model as it always does."
)
