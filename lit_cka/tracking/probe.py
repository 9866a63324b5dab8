"""A fixed set of batches to track on, whatever the training validates on: `Probe`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_cka.features.calling import call_model, evaluating
from lit_cka.features.lightning_private import before_batch_transfer
from lit_cka.reference.arguments import private_copy
from lit_cka.samples.counting import data_ranks
from lit_cka.samples.random_states import preserved_rng
from lit_cka.samples.samples import samples_of_content
from lit_cka.tracking.preserved_state import preserved_state
from lit_cka.tracking.tracked_model import TrackedModel
from lit_cka.tracking.tracker import LayerScore


class Probe:
    """Runs a module on batches of its own, with nothing of the training changed.

    Of several ranks, each takes every W-th batch. A batch goes to the module's `predict_step` if it has one, else to
    its `forward`: a mapping as the keyword arguments that `forward` takes, of a tuple or list the first element,
    anything else as it is.

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

    def record(self, trainer: pl.Trainer, model: TrackedModel, initial: Mapping[str, Tensor] | None) -> None:
        """Record the reference on all batches, once.

        Args:
            trainer: that the module is in.
            model: the live model with its reference.
            initial: the weights that the training began with, if the live model has others by now.

        Raises:
            ValueError: if the module is sharded over the ranks, which all have to run it together.
        """
        if model.is_sharded:
            raise ValueError("Expected a module that every rank holds for `probe`, but got one sharded over ranks.")
        if model.is_recorded("probe", {0: set()}):
            return
        recording_pass = model.recording_pass(initial)
        model.tracker.open("probe", 1, data_ranks(trainer), record=True)
        try:
            for index, batch, is_last in self._each(trainer, model.module):
                samples = samples_of_content(batch)
                recording_pass.begin_batch(batch, 0)
                _run(trainer, model.module, batch, index)
                repeat = partial(_run, trainer, model.module, index=index)
                recording_pass.end_batch(samples, 0, is_last=is_last, repeat=repeat)
        finally:
            recording_pass.finish()
            model.tracker.close()
        model.tracker.conclude_recording()

    def measure(self, trainer: pl.Trainer, model: TrackedModel) -> dict[str, LayerScore]:
        """Return the score of every layer on all batches; every rank has to call it."""
        model.tracker.open("probe", 1, data_ranks(trainer))
        try:
            for index, batch, _ in self._each(trainer, model.module):
                samples = samples_of_content(batch)
                model.tracker.begin(0, batch)
                _run(trainer, model.module, batch, index)
                model.tracker.compare(samples)
        finally:
            model.tracker.close()
        return model.tracker.scores(0)

    def _each(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[int, Any, bool]]:
        """Yield this rank's batches on its device, with the module in evaluation and random states kept apart."""
        with torch.no_grad(), preserved_rng(), preserved_state([module]), evaluating(module):
            mine = ((i, batch) for i, batch in enumerate(self.batches) if i % trainer.world_size == trainer.global_rank)
            following = next(mine, None)
            while following is not None:
                (index, batch), following = following, next(mine, None)
                batch = trainer.precision_plugin.convert_input(private_copy(batch))
                batch = before_batch_transfer(module, batch)
                yield index, trainer.strategy.batch_to_device(batch, module.device), following is None


def _run(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
    with trainer.precision_plugin.forward_context():
        _call(module, batch, index)


def _call(module: pl.LightningModule, batch: Any, index: int) -> None:
    if is_overridden("predict_step", module):
        module.predict_step(batch, index)
    else:
        call_model(module, batch)
