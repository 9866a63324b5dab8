"""A fixed set of batches to track on, whatever the training validates on: `Probe`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor

from lit_cka.features.calling import call_model, evaluating
from lit_cka.reference.isolation import preserved_rng
from lit_cka.tracking.tracker import Tracker


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

    def run(
        self, trainer: pl.Trainer, module: pl.LightningModule, tracker: Tracker, *, rehearsal: bool = False
    ) -> None:
        """Track the module on all batches; in a rehearsal, on the first one, to see what would go wrong.

        Raises:
            ValueError: if the module is sharded over the ranks, which all have to run it together.
        """
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise ValueError("Expected a module that every rank holds for `probe`, but got one sharded over ranks.")
        tracker.open("probe", 1, module.device)
        try:
            with torch.no_grad(), preserved_rng(), evaluating(module):
                for index, batch in enumerate(self.batches):
                    if index % trainer.world_size == trainer.global_rank or rehearsal:
                        batch = trainer.precision_plugin.convert_input(batch)
                        batch = module._on_before_batch_transfer(batch)
                        batch = trainer.strategy.batch_to_device(batch, module.device)
                        tracker.begin(0, index, rehearsal=rehearsal)
                        with trainer.precision_plugin.forward_context():
                            _call(module, batch, index)
                        tracker.end()
                    if rehearsal:
                        break
        finally:
            tracker.close()


def _call(module: pl.LightningModule, batch: Any, index: int) -> None:
    if is_overridden("predict_step", module):
        module.predict_step(batch, index)
    else:
        call_model(module, batch)
