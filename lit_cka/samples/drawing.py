"""Samples and batches drawn from a dataloader beside its own iteration, with nothing of it changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, IterDataPipe, MapDataPipe

from lit_cka.samples.generators import advance, generators_in, preserved_attributes, preserved_generators
from lit_cka.samples.random_states import preserved_rng
from lit_cka.samples.shares import NoCollectives, copied_sampler

_SEED = 4801


class CannotDrawError(Exception):
    """The dataloader can't be read beside its own iteration."""


@contextmanager
def untouched(*holders: Any) -> Iterator[None]:
    """Leave all random states, and those and the attributes of datasets, transforms and the like, as they were."""
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_generators(holders))
        stack.enter_context(preserved_attributes(holders))
        yield


def change_random_states(number: int, *holders: Any) -> None:
    """Set the global random states by the number, and draw from generators that are held: within `untouched`."""
    seed = _SEED + number
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    for generator in generators_in(holders):
        advance(generator, 1 + number)


def holders_of(loader: Any) -> list[Any]:
    """What holds state that drawing from a dataloader, or another iterable of batches, may change."""
    if not isinstance(loader, DataLoader):
        return [loader]
    collate = loader.collate_fn
    owner = [collate.__self__] if isinstance(collate, MethodType) and isinstance(collate.__self__, Dataset) else []
    return [loader.dataset, collate, *owner]


@contextmanager
def unread(loaders: Iterable[Any]) -> Iterator[None]:
    """Leave dataloaders, their samplers, and what they read from, as if they had not been read meanwhile."""
    parts = [part for loader in loaders for part in _parts_of(loader)]
    holders = [holder for part in parts for holder in holders_of(part)]
    held = [vars(part) for part in parts if isinstance(part, DataLoader)]
    samplers = [each.get(name) for each in held for name in ("sampler", "batch_sampler")]
    without_workers = [each for each in held if each.get("_iterator") is None]
    with untouched(*holders, *(sampler for sampler in samplers if sampler is not None)):
        try:
            yield
        finally:
            for each in without_workers:  # that persist: they start again, by a seed that is drawn then
                each["_iterator"] = None


def _parts_of(loader: Any) -> list[Any]:
    if not isinstance(loader, CombinedLoader):
        return [loader]
    return [part for each in loader.flattened for part in _parts_of(each)]


def fetch(dataset: Any, indices: Sequence[Any]) -> list[Any]:
    """Copies of samples of a map-style dataset, fetched as torch's dataloaders do.

    Copies, since the dataset may keep what it returns, and functions that collate may change it.
    """
    if getattr(dataset, "__getitems__", None):
        return copy.deepcopy(list(dataset.__getitems__(list(indices))))
    return copy.deepcopy([dataset[index] for index in indices])


def drawing(loader: Any, num_batches: int) -> Callable[[], list[Any]]:
    """A function that draws the first batches, by the same indices each time; to be used within `untouched`.

    The indices are those that a copy of the sampler yields.

    Raises:
        CannotDrawError: where samples would be used up, or depend on the iteration that runs.
    """
    if not isinstance(loader, DataLoader):
        return lambda: list(islice(_anew(loader), num_batches))
    dataset = loader.dataset
    if isinstance(dataset, (IterDataPipe, MapDataPipe)):
        raise CannotDrawError  # which take their order and share from it
    if isinstance(dataset, IterableDataset):
        return lambda: list(islice(_collated(_anew(dataset), loader), num_batches))
    indices = _first_indices(loader, num_batches)
    return lambda: [_fetched(loader, of_batch) for of_batch in indices]


def _first_indices(loader: DataLoader[Any], num_batches: int) -> list[Any]:
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    try:
        with NoCollectives():  # type: ignore[no-untyped-call]
            return list(islice(copied_sampler(sampler, loader), num_batches))
    except Exception:  # of any kind: a sampler of the user's
        size = loader.batch_size or 1
        length = len(loader.dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        starts = range(0, min(length, num_batches * size), size)
        return [list(range(start, min(start + size, length))) for start in starts]


def _fetched(loader: DataLoader[Any], indices: Any) -> Any:
    if loader.batch_sampler is None:
        return loader.collate_fn(copy.deepcopy(loader.dataset[indices]))
    return loader.collate_fn(fetch(loader.dataset, list(indices)))


def _collated(samples: Iterator[Any], loader: DataLoader[Any]) -> Iterator[Any]:
    if loader.batch_size is None:
        yield from map(loader.collate_fn, samples)
    else:
        while batch := list(islice(samples, loader.batch_size)):
            yield loader.collate_fn(batch)


def _anew(iterable: Iterable[Any]) -> Iterator[Any]:
    """An iterator of its own, unless that would use up what another one reads."""
    held = vars(iterable).values() if hasattr(iterable, "__dict__") else []
    if isinstance(iterable, Iterator) or any(isinstance(value, Iterator) for value in held):
        raise CannotDrawError
    iterator = iter(iterable)
    if iterator is iterable or iterator is iter(iterable):
        raise CannotDrawError
    return iterator
