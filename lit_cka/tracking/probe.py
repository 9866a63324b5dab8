"""A fixed set of batches to track on, whatever the training validates on: `Probe`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_cka.features.calling import call_model, evaluating
from lit_cka.features.lightning_private import before_batch_transfer
from lit_cka.reference.arguments import private_copy
from lit_cka.reference.exchange import Weights
from lit_cka.samples.counting import data_ranks
from lit_cka.samples.random_states import preserved_rng
from lit_cka.samples.sample_keys import BatchSamples
from lit_cka.samples.samples import samples_of_content
from lit_cka.tracking.preserved_state import preserved_state
from lit_cka.tracking.probe_batches import ProbeBatch, batches_of_rank
from lit_cka.tracking.tracked_model import TrackedModel
from lit_cka.tracking.tracker import LayerScore


class Probe:
    """Runs a module on batches of its own, with nothing of the training changed.

    Of several ranks, each takes every W-th batch; ranks that share a model run it together. A batch goes to the
    module's `predict_step` if it has one, else to its `forward`: a mapping as the keyword arguments that `forward`
    takes, of a tuple or list the first element, anything else as it is.

    Args:
        batches: a dataloader, or a list of batches: to be gone through again and again.

    Raises:
        ValueError: if `batches` can be gone through once only.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise ValueError(
                "Expected `probe` to be a dataloader or a list of batches, to be gone through at every measurement, "
                f"but got {type(batches).__name__}."
            )
        self.batches = batches

    def record(self, trainer: pl.Trainer, model: TrackedModel, initial: Weights | None) -> None:
        """Record the reference on all batches, once.

        Args:
            trainer: that the module is in.
            model: the live model with its reference.
            initial: the weights that the training began with, if the live model has others by now.

        Raises:
            ValueError: if the module is sharded, and only some processes have batches.
        """
        if model.is_recorded("probe", {0: set()}):
            return
        recording_pass = model.recording_pass(initial)
        model.tracker.open("probe", 1, data_ranks(trainer), record=True)
        try:
            for each, batch, samples in self._each(trainer, model):
                recording_pass.begin_batch(batch, 0)
                _run(trainer, model, batch, each.number)
                repeat = partial(_run, trainer, model, index=each.number)
                recording_pass.end_batch(samples, 0, is_last=each.is_last, repeat=repeat)
        finally:
            recording_pass.finish()
            model.tracker.close()
        model.tracker.conclude_recording()

    def measure(self, trainer: pl.Trainer, model: TrackedModel) -> dict[str, LayerScore]:
        """Return the score of every layer on all batches; every rank has to call it."""
        model.tracker.open("probe", 1, data_ranks(trainer))
        try:
            for each, batch, samples in self._each(trainer, model):
                model.tracker.begin(0)
                _run(trainer, model, batch, each.number)
                model.tracker.compare(samples)
        finally:
            model.tracker.close()
        return model.tracker.scores(0)

    def _each(self, trainer: pl.Trainer, model: TrackedModel) -> Iterator[tuple[ProbeBatch, Any, BatchSamples]]:
        """Yield this rank's batches on its device, with the module in evaluation and random states kept apart."""
        module = model.module
        with torch.no_grad(), preserved_rng(), preserved_state([module]), evaluating(module):
            # A dataloader that shuffles then gives all ranks the same order, to share out.
            torch.default_generator.manual_seed(0)
            for each in batches_of_rank(self.batches, data_ranks(trainer), in_step=model.is_sharded):
                batch = trainer.precision_plugin.convert_input(private_copy(each.batch))
                batch = before_batch_transfer(module, batch)
                batch = trainer.strategy.batch_to_device(batch, module.device)
                samples = samples_of_content(batch)
                if not each.counts:
                    samples.counted = torch.zeros(len(samples), dtype=torch.bool)
                yield each, batch, samples


def _run(trainer: pl.Trainer, model: TrackedModel, batch: Any, index: int) -> None:
    """Run the module on a batch: by what the strategy has wrapped around it, if each process has a part of it."""
    module = model.module
    through = cast(nn.Module, trainer.strategy.model) if model.is_sharded else module
    with trainer.precision_plugin.forward_context():
        if not is_overridden("predict_step", module):
            call_model(module, batch, through)
        elif through is module:
            module.predict_step(batch, index)
        else:
            trainer.strategy.predict_step(batch, index)
