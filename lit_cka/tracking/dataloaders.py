"""Which of a trainer's evaluation dataloaders to track, and which of their samples are no repetitions."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import lightning.pytorch as pl
from torch.utils.data import BatchSampler, DistributedSampler

from lit_cka.parallel.warning import warn
from lit_cka.samples.sampler_indices import evaluated_loaders
from lit_cka.tracking.history import Stage


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
    loaders = evaluated_loaders(trainer)
    unknown = [index for index in indices or () if index >= len(loaders)]
    if unknown:
        raise ValueError(f"Expected `dataloaders` to be indices below {len(loaders)}, but got {unknown}.")
    tracked = [index for index in range(len(loaders)) if indices is None or index in indices]
    for index in tracked:
        dataset = getattr(loaders[index], "dataset", None)
        # A rank's own share may be small, or empty, and the others would wait for it.
        is_whole = trainer.world_size == 1 or _distributed_sampler(loaders[index]) is not None
        if isinstance(dataset, Sized) and len(dataset) < num_samples and is_whole:
            size = f"has {len(dataset)}" if len(dataset) else "is empty"
            raise ValueError(
                f"CKA takes at least {num_samples} samples, but the dataset of {stage} dataloader {index} {size}. "
                "Track others by `dataloaders=`, or another stage by `stages=`."
            )
    return tracked, len(loaders)


def _distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) else None


def num_first_samples(
    trainer: pl.Trainer, stage: Stage, dataloader: int, batch_idx: int, max_batches: int | None = None
) -> int | None:
    """How many samples of a batch, from its start on, no rank has had before; None for all.

    torch's `DistributedSampler` repeats samples to give all ranks as many. It appends them to the list that it deals
    out to the ranks in turn, so sample `k` of rank `r` among `W` is a repetition if `r + k W` is `N` or more.

    With `max_batches`, only the samples count that so many batches would hold without ranks; where the order of the
    samples isn't known, each rank's own first batches.
    """
    loader = evaluated_loaders(trainer)[dataloader]
    sampler = _distributed_sampler(loader)
    own_first = None if max_batches is None or batch_idx < max_batches else 0
    if sampler is None:
        return own_first
    num_samples = len(cast(Sized, sampler.dataset))
    if type(loader.batch_sampler) is not BatchSampler or not getattr(loader, "in_order", True):
        if sampler.total_size > num_samples:
            warn(
                f"{stage} dataloader {dataloader} repeats {sampler.total_size - num_samples} of {num_samples} samples "
                f"to give all ranks as many, in an order that {type(loader.batch_sampler).__name__} hides: they count "
                "twice in CKA."
            )
        return own_first
    batch_size = loader.batch_sampler.batch_size
    counted = num_samples if max_batches is None else min(max_batches * batch_size, num_samples)
    if counted >= sampler.total_size:
        return None
    own = (counted - sampler.rank + sampler.num_replicas - 1) // sampler.num_replicas
    return int(min(max(own - batch_idx * batch_size, 0), batch_size))
