"""Which samples each batch of an evaluation holds, and which of them this rank counts: `EvaluationSamples`."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lit_cka.samples.batch_rows import BatchRows, rows_of
from lit_cka.samples.counting import COUNTS, NOT, OPEN, DataRanks, Occurrences, any_rank, data_ranks, settle
from lit_cka.samples.data_checks import dataset_fingerprint, draws_differ, keeps_order, root_of, transfer_of
from lit_cka.samples.hashing import row_hashes
from lit_cka.samples.sample_keys import BatchSamples, Indices, Kind, joined_keys, keys_of_hashes, keys_of_indices
from lit_cka.samples.sampler_indices import (
    LoopWatch,
    Read,
    WatchedLoaders,
    evaluated_loaders,
    step_takes_batches,
    watch_loops,
    watched_loaders,
)
from lit_cka.samples.shares import DealtShare, Share, known_share


def samples_of_content(batch: Any) -> BatchSamples:
    """Returns the samples of a batch by what it holds of them; all of them count."""
    rows = rows_of(batch)
    keys = content_keys(batch, rows.num_samples or 1)
    known = torch.zeros(0, 2, dtype=torch.int64) if keys is None else keys
    return BatchSamples("unknown" if keys is None else "hash", known, torch.ones(len(known), dtype=torch.bool), rows)


def content_keys(batch: Any, num_samples: int) -> Tensor | None:
    """Returns keys (n, 2) by what a batch holds of each sample; None if that can't be told."""
    hashes = row_hashes(batch, num_samples)
    return None if hashes is None else keys_of_hashes(hashes)


@dataclass
class _Pass:
    """What is known of one dataloader, or of several side by side, in the evaluation that runs."""

    share: Share | None
    max_batches: int | None
    batches: list[BatchSamples] = field(default_factory=list)
    occurrences: Occurrences = field(default_factory=Occurrences)
    numbers: list[Tensor] = field(default_factory=list)  # of each sample among those of its key


@dataclass(frozen=True)
class _Data:
    """What is known of a dataloader's data."""

    loader: DataLoader[Any]
    keeps_order: bool
    fingerprint: int  # of the dataset, or of what it is a `Subset` of
    indices: npt.NDArray[np.int64] | None  # there, of the dataset's samples; None if they are the same


class EvaluationSamples:
    """Knows the samples of each batch of a trainer's validations and tests, and who counts them.

    A sample is known by its index in a map-style dataset, as the sampler yields it, together with a fingerprint of the
    dataset; else by a hash of all that the batch holds of it. So it is recognised in another order, in another batch,
    on another rank, in a later process. Each counts once on any number of ranks: by its index where there is one,
    however often the samplers yield it; else all that one rank has, less what another one has too.

    Args:
        trainer: whose evaluations.
        rank: this process's number among those that hold different samples; None for what the strategy says.
        world_size: how many they are; None for what the strategy says.
        group: their process group; None for what the strategy says, or all.

    Attributes:
        ranks: the processes that hold different samples, in the pass that has begun. Sums are to be taken over them.
        step_takes_batches: whether, in this pass, the module's step takes its batches itself (`dataloader_iter`):
            then `of_batch` is to be called after the step, where Lightning says which batch it was.
    """

    def __init__(
        self, trainer: pl.Trainer, rank: int | None = None, world_size: int | None = None, group: Any = None
    ) -> None:
        self._trainer = trainer
        self._given = rank, world_size, group
        self._watches: list[LoopWatch] = []
        self._loaders: WatchedLoaders | None = None
        self._passes: dict[int, _Pass] = {}
        self._data: dict[int, _Data] = {}  # by the dataloader's id
        self._earlier: dict[int, _Data] = {}  # of the pass before
        self.ranks = DataRanks(0, 1, None, torch.device("cpu"))
        self.step_takes_batches = False

    def watch(self) -> None:
        """Note from now on which indices the evaluations' dataloaders read. Nothing that they yield is changed."""
        self._watches = watch_loops(self._trainer, self)

    def close(self) -> None:
        """Leave the trainer as it was."""
        for watch in self._watches:
            watch.remove(self)
        self._watches, self._loaders = [], None
        self._passes, self._data, self._earlier = {}, {}, {}

    def begin(self, tracked: Sequence[int], max_batches: int | None = None) -> None:
        """Begin a pass: to be called when the loop has made its iterators, as in `on_validation_start`.

        Args:
            tracked: indices of the dataloaders.
            max_batches: of each dataloader, count the samples alone that so many batches would hold in one process;
                where their order isn't known, those of each rank's own first batches. None for all.
        """
        self.ranks = data_ranks(self._trainer, *self._given)
        self.step_takes_batches = step_takes_batches(self._trainer)
        self._loaders = watched_loaders(self._trainer)
        self._earlier, self._data, self._passes = self._data, {}, {}
        for dataloader in tracked:
            self._passes[dataloader] = _Pass(self._share(dataloader, max_batches), max_batches)

    def _share(self, dataloader: int, max_batches: int | None) -> Share | None:
        """The share of this rank, where it is known before its samples are read."""
        loader = evaluated_loaders(self._trainer)[dataloader]
        if self.ranks.size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        return known_share(loader, self.ranks.rank, self.ranks.size, max_batches)

    def num_samples(self, dataloader: int) -> int | None:
        """The number of samples of the dataloader's dataset; None where that isn't known."""
        dataset = getattr(evaluated_loaders(self._trainer)[dataloader], "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None

    def changing(self, tracked: Sequence[int]) -> list[int]:
        """Which of the dataloaders give other data when they are read again, as `data_checks.draws_differ` finds.

        What the module's and the datamodule's hooks do to a batch before the step gets it counts too. To be called
        while an evaluation is set up. Ranks with other data may come to other verdicts.
        """
        loaders = evaluated_loaders(self._trainer)
        return [index for index in tracked if draws_differ(loaders[index], *transfer_of(self._trainer, index))]

    def dataset_words(self, dataloader: int) -> set[int]:
        """Returns the second words of the keys that indices of the dataloader's dataset have, if there are any."""
        loader = evaluated_loaders(self._trainer)[dataloader]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return set()
        keys = keys_of_indices(np.zeros(1, dtype=np.int64), self._known_data(loader).fingerprint)
        return set() if keys is None else {int(keys[0, 1])}

    @torch.inference_mode(False)  # what is made here may be used, and changed, outside of `validate`
    def of_batch(self, dataloader: int, batch_idx: int, batch: Any) -> BatchSamples:
        """The samples of a batch of a tracked dataloader: for each batch once, before the step may change it.

        Args:
            dataloader: its index.
            batch_idx: the batch's number, as Lightning's hooks get it.
            batch: as the step gets it.
        """
        of_pass = self._passes[dataloader]
        rows = rows_of(batch)
        reads = self._reads(dataloader, batch_idx)
        keys = None if reads is None else self._index_keys(reads, rows)
        kind: Kind = "index"
        if keys is None:
            hashes = row_hashes(batch, rows.num_samples or 1)
            kind = "unknown" if hashes is None else "hash"
            keys = keys_of_hashes(hashes or [])
        samples = BatchSamples(kind, keys, None, rows)
        self._count(of_pass, samples, batch_idx, reads)
        return samples

    def _reads(self, dataloader: int, batch_idx: int) -> list[Read] | None:
        if self._loaders is None:
            return None
        if self._loaders.is_sequential:
            return self._loaders.parts[dataloader].read(batch_idx)
        return self._loaders.read(batch_idx)

    def _index_keys(self, reads: list[Read], rows: BatchRows) -> Tensor | None:
        """Keys by the indices; None where it can't be told which sample has which."""
        sizes = {len(read.indices) for read in reads}
        if len(sizes) != 1:
            return None
        (n,) = sizes
        # Samples may be left out, or become several, before they are collated.
        if rows.votes and n not in rows.votes:
            return None
        keys = []
        for read in reads:
            data = self._known_data(read.loader)
            of_read = _keys_in(data, read.indices) if data.keeps_order else None
            if of_read is None:
                return None
            keys.append((read.position, of_read))
        is_alone = len(keys) == 1 and (self._loaders is None or self._loaders.is_sequential)
        return keys[0][1] if is_alone else joined_keys(keys)

    def _known_data(self, loader: DataLoader[Any]) -> _Data:
        data = self._data.get(id(loader), self._earlier.get(id(loader)))
        if data is None:
            root, indices = root_of(loader.dataset)
            data = _Data(loader, keeps_order(loader), dataset_fingerprint(root), indices)
        elif id(loader) not in self._data and _may_shuffle(loader):
            # In another order, the batches do not tell whether their samples are what they were in the pass before.
            data = replace(data, fingerprint=dataset_fingerprint(root_of(loader.dataset)[0], data.fingerprint))
        self._data[id(loader)] = data
        return data

    def _count(self, of_pass: _Pass, samples: BatchSamples, batch_idx: int, reads: list[Read] | None) -> None:
        """Tell which of the batch's samples count, where that is known by now."""
        numbers = of_pass.occurrences.of(samples.keys)
        counted: Tensor | None = numbers >= 0
        by_index = samples.kind == "index"
        if self.ranks.size > 1:
            counted = None
            if by_index and of_pass.share is not None and reads is not None:
                mask = of_pass.share.counted(reads[0].indices, reads[0].start)
                counted = None if mask is None else torch.from_numpy(mask.copy())
        if counted is not None and by_index:
            counted &= numbers == 0
        is_dealt = counted is not None and isinstance(of_pass.share, DealtShare)  # which knows of `max_batches`
        if of_pass.max_batches is not None and batch_idx >= of_pass.max_batches and not is_dealt:
            counted = numbers < 0
        samples.counted = counted
        of_pass.batches.append(samples)
        of_pass.numbers.append(numbers)

    @torch.inference_mode(False)
    def resolve(self, dataloader: int) -> Tensor | None:
        """Settle which samples count where that was open; every rank has to call it, at the end of the pass.

        `counted` of every batch of the pass is set.

        Returns:
            A mask over all samples of this rank, in the order of the pass; None if nothing was open on any rank.
        """
        of_pass = self._passes[dataloader]
        batches = of_pass.batches
        if not any_rank(any(batch.counted is None for batch in batches), self.ranks):
            return None
        states = [_states(batch, numbers) for batch, numbers in zip(batches, of_pass.numbers, strict=True)]
        none = keys_of_hashes([])
        keys = torch.cat([none, *(batch.keys for batch in batches)])
        mask = settle(keys, torch.cat([none[:, 0], *of_pass.numbers]), torch.cat([none[:, 0], *states]), self.ranks)
        for batch, counted in zip(batches, mask.split([len(batch.keys) for batch in batches]), strict=True):
            batch.counted = counted
        return mask


def _may_shuffle(loader: DataLoader[Any]) -> bool:
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return True
    return sampler.shuffle if isinstance(sampler, DistributedSampler) else not isinstance(sampler, SequentialSampler)


def _keys_in(data: _Data, indices: Indices) -> Tensor | None:
    if data.indices is not None and isinstance(indices, np.ndarray):
        indices = data.indices[indices]
    return keys_of_indices(indices, data.fingerprint)


def _states(batch: BatchSamples, numbers: Tensor) -> Tensor:
    """Of each sample, whether it counts, or that this is open; by its index, it counts once however often it came."""
    if batch.counted is not None:
        return torch.where(batch.counted, COUNTS, NOT)
    may_count = (numbers == 0) | (batch.kind != "index")
    return torch.where(may_count, OPEN, NOT)
