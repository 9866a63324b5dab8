"""Which of a trainer's evaluation dataloaders to track."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized

import lightning.pytorch as pl

from lit_cka.history import Stage


def tracked_dataloaders(
    trainer: pl.Trainer, stage: Stage, indices: Sequence[int] | None, num_samples: int
) -> tuple[list[int], int]:
    """Indices of the dataloaders to track, and how many dataloaders there are.

    Args:
        trainer: with its dataloaders set up.
        stage: whose dataloaders.
        indices: the ones asked for; None for all.
        num_samples: what each needs at least.

    Raises:
        ValueError: if there is none with an index, or one is known to have fewer samples.
    """
    loaders = trainer.val_dataloaders if stage == "validate" else trainer.test_dataloaders
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    combined = trainer._evaluation_loop._combined_loader
    if not isinstance(loaders, (list, tuple)) or (combined is not None and combined._mode != "sequential"):
        loaders = [loaders]  # one after the other they are several, side by side one
    unknown = [index for index in indices or () if index >= len(loaders)]
    if unknown:
        raise ValueError(f"Expected `dataloaders` to be indices below {len(loaders)}, but got {unknown}.")
    tracked = [index for index in range(len(loaders)) if indices is None or index in indices]
    for index in tracked:
        dataset = getattr(loaders[index], "dataset", None)
        if isinstance(dataset, Sized) and len(dataset) < num_samples:
            raise ValueError(
                f"CKA takes at least {num_samples} samples, but the dataset of {stage} dataloader {index} has "
                f"{len(dataset)}. Track others by `dataloaders=`, or another stage by `stages=`."
            )
    return tracked, len(loaders)
