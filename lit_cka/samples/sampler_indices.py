"""Which indices of their datasets an evaluation's dataloaders read, batch by batch, noted while Lightning iterates.

All that is private to torch or Lightning stands here: checked with torch 2.15.0 and lightning 2.6.6. Where it is not
as expected, no indices are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, MapDataPipe
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter, _SingleProcessDataLoaderIter

from lit_cka.features.lightning_private import combined_loader, evaluation_loop, is_sequential
from lit_cka.samples.sample_keys import Indices


class Read(NamedTuple):
    """What a batch holds of one dataloader.

    Attributes:
        position: the dataloader's number among all that a batch is made of.
        loader: the dataloader.
        indices: of the samples, in the order in which they were read.
        start: how many samples of the dataloader were read before.
    """

    position: int
    loader: DataLoader[Any]
    indices: Indices
    start: int


class _IndexIterator:
    """What the sampler of batches yields, unchanged, with a copy of it noted."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.batches: list[Indices | None] = []
        self.starts = [0]

    def __iter__(self) -> _IndexIterator:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        indices = _copied(batch)
        self.batches.append(indices)
        self.starts.append(self.starts[-1] + (0 if indices is None else len(indices)))
        return batch


def _copied(batch: Any) -> Indices | None:
    if isinstance(batch, Tensor):
        batch = batch.detach().cpu().numpy()
    if isinstance(batch, (list, tuple, range)):
        indices = [index.item() if isinstance(index, Tensor) and not index.ndim else index for index in batch]
        if not all(isinstance(index, (int, np.integer)) and not isinstance(index, bool) for index in indices):
            return indices
        return np.array(indices, dtype=np.int64)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "iu" and batch.ndim == 1:
        return np.array(batch, dtype=np.int64)
    return None  # reading it might use it up


class _NotingSampler:
    """Stands in for a sampler of batches while a dataloader makes its iterator."""

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self.iterator: _IndexIterator | None = None

    def __iter__(self) -> _IndexIterator:
        self.iterator = _IndexIterator(iter(self._batch_sampler))
        return self.iterator

    def __len__(self) -> int:
        return len(self._batch_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch_sampler, name)


def _iterate(loader: DataLoader[Any]) -> tuple[Iterator[Any], _IndexIterator | None]:
    """A new iterator over the dataloader, and the indices it reads; None where they can't be told."""
    batch_sampler = vars(loader).get("batch_sampler")
    has_indices = batch_sampler is not None and not isinstance(loader.dataset, (IterableDataset, MapDataPipe))
    if not has_indices or (loader.num_workers > 0 and not getattr(loader, "in_order", True)):
        return iter(loader), None
    noting = _NotingSampler(batch_sampler)
    used = [persistent] if (persistent := getattr(loader, "_iterator", None)) is not None else []  # with its workers
    try:
        object.__setattr__(loader, "batch_sampler", noting)
        for each in used:
            each._index_sampler = noting
        iterator: Any = iter(loader)
        used.append(iterator)
    finally:
        object.__setattr__(loader, "batch_sampler", batch_sampler)
        for each in used:
            if getattr(each, "_index_sampler", None) is noting:
                each._index_sampler = batch_sampler
    if type(iterator) not in (_SingleProcessDataLoaderIter, _MultiProcessingDataLoaderIter):
        return iterator, None  # say, one that leaves out batches
    is_new = iterator._sampler_iter is noting.iterator and iterator._num_yielded == 0
    return iterator, noting.iterator if is_new else None


class _Watched:
    """A dataloader as Lightning iterates it; of any other iterable nothing is noted."""

    num_loaders = 1

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterators: list[_IndexIterator | None] = []

    def __iter__(self) -> Iterator[Any]:
        iterator, indices = _iterate(self.loader) if isinstance(self.loader, DataLoader) else (iter(self.loader), None)
        self._iterators.append(indices)
        return iterator

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:  # such as `sampler`, whose epoch Lightning sets
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def read(self, number: int, position: int = 0) -> list[Read] | None:
        """What the batch of this number holds: nothing after the dataloader's end; None where that can't be told."""
        start = 0
        for iterator in self._iterators:  # several where a shorter dataloader starts again beside a longer one
            if iterator is None:
                return None
            if number < len(iterator.batches):
                indices, start = iterator.batches[number], start + iterator.starts[number]
                return None if indices is None else [Read(position, self.loader, indices, start)]
            number -= len(iterator.batches)
            start += iterator.starts[-1]
        return []


class WatchedLoaders:
    """All dataloaders of a `CombinedLoader`, while Lightning iterates it once."""

    def __init__(self, combined: CombinedLoader) -> None:
        self.loader = combined
        self._num_iterators = 0
        self.parts = [
            WatchedLoaders(loader) if isinstance(loader, CombinedLoader) else _Watched(loader)
            for loader in combined.flattened
        ]
        self.num_loaders: int = sum(part.num_loaders for part in self.parts)

    @property
    def is_sequential(self) -> bool:
        """Whether the dataloaders come one after the other, instead of side by side in each batch."""
        return is_sequential(self.loader)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Iterators over the `CombinedLoader` that are made meanwhile note the indices, as long as they are used."""
        loaders = self.loader._flattened
        try:
            self.loader._flattened = self.parts
            yield
        finally:
            self.loader._flattened = loaders

    def __iter__(self) -> Iterator[Any]:
        self._num_iterators += 1
        with self.watching():
            return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def read(self, number: int, position: int = 0) -> list[Read] | None:
        """What the batch of this number holds, of dataloaders that are read side by side; None where unknown."""
        if self.is_sequential or self._num_iterators > 1:
            return None
        reads: list[Read] = []
        for part in self.parts:
            found = part.read(number, position)
            if found is None:
                return None
            reads += found
            position += part.num_loaders
        return reads


class LoopWatch:
    """Stands in for the `reset` of an evaluation loop, which begins a pass over its dataloaders."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._replaced = vars(loop).get("reset")
        self.users: list[object] = []
        self.loaders: WatchedLoaders | None = None  # of the latest pass

    def __call__(self) -> None:
        reset = self._replaced or type(self._loop).reset.__get__(self._loop)
        combined = combined_loader(self._loop)
        is_known = isinstance(combined, CombinedLoader) and hasattr(combined, "_flattened")
        self.loaders = WatchedLoaders(combined) if self.users and is_known else None
        if self.loaders is None:
            reset()
            return
        with self.loaders.watching():
            reset()

    def remove(self, user: object) -> None:
        """Put back what was there, once the last user is gone."""
        self.users = [other for other in self.users if other is not user]
        if not self.users and vars(self._loop).get("reset") is self:
            del self._loop.reset
            if self._replaced is not None:
                self._loop.reset = self._replaced


def watch_loops(trainer: pl.Trainer, user: object) -> list[LoopWatch]:
    """Watch the validation and test loops of the trainer for this user, beside others who do."""
    watches = []
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        watch = vars(loop).get("reset")
        if not isinstance(watch, LoopWatch):
            watch = LoopWatch(loop)
            loop.reset = watch  # type: ignore[method-assign]
        if all(other is not user for other in watch.users):
            watch.users.append(user)
        watches.append(watch)
    return watches


def evaluated_loaders(trainer: pl.Trainer) -> list[Any]:
    """The dataloaders of the evaluation, set up: nested ones one by one, those read side by side as one."""
    combined = combined_loader(evaluation_loop(trainer))
    assert combined is not None
    return list(combined.flattened) if is_sequential(combined) else [combined]


def step_takes_batches(trainer: pl.Trainer) -> bool:
    """Whether the module's step takes its batches from an iterator itself, so that they are not known before."""
    return isinstance(evaluation_loop(trainer)._data_fetcher, _DataLoaderIterDataFetcher)


def watched_loaders(trainer: pl.Trainer) -> WatchedLoaders | None:
    """The dataloaders of the evaluation that runs; None if it isn't watched."""
    watch = vars(evaluation_loop(trainer)).get("reset")
    return watch.loaders if isinstance(watch, LoopWatch) else None
