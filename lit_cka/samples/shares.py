"""Which samples of its dataloader a rank counts, so that each counts once, known before they are read.

That is so for torch's `DistributedSampler`, which deals the samples out in turn, and for subclasses of it whose shares
can be worked out for all ranks. Where it is not, the ranks have to tell each other: `lit_cka.samples.counting`.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from lit_cka.samples.generators import generators_in, state_of
from lit_cka.samples.hashing import content_hash
from lit_cka.samples.random_states import preserved_rng
from lit_cka.samples.sample_keys import Indices

Mask = npt.NDArray[np.bool_]
_MOST_WORKED_OUT = 2**20  # indices, of all ranks together


class DealtShare:
    """Every `num_ranks`-th sample, of which those from the position `end` on are repeated, or not asked for."""

    def __init__(self, rank: int, num_ranks: int, end: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._end = end

    def counted(self, indices: Indices, start: int) -> Mask | None:
        """Which samples count (n,), of those that are read after `start` others."""
        return self._rank + self._num_ranks * (start + np.arange(len(indices))) < self._end


class WorkedOutShare:
    """A list of indices for each rank. Of equal ones the first counts, and of those the lowest rank's."""

    def __init__(self, rank: int, shares: list[npt.NDArray[np.int64]]) -> None:
        self._indices = shares[rank]
        positions = np.concatenate([np.arange(len(share)) for share in shares])
        ranks = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
        indices = np.concatenate(shares)
        order = np.lexsort([ranks, positions, indices])
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = indices[order][1:] != indices[order][:-1]
        first = order[is_first]
        self._counted = np.zeros(len(self._indices), dtype=bool)
        self._counted[positions[first][ranks[first] == rank]] = True

    def counted(self, indices: Indices, start: int) -> Mask | None:
        """Which samples count (n,), of those that are read after `start` others; None if they are not as expected."""
        end = start + len(indices)
        is_as_expected = isinstance(indices, np.ndarray) and np.array_equal(self._indices[start:end], indices)
        return self._counted[start:end] if is_as_expected else None


Share = DealtShare | WorkedOutShare


def known_share(loader: DataLoader[Any], rank: int, num_ranks: int, max_batches: int | None) -> Share | None:
    """The share of a rank, where it is known before the samples are read.

    Args:
        loader: the dataloader, of a map-style dataset.
        rank: this process's number among those that hold other samples.
        num_ranks: how many of them there are.
        max_batches: where samples are dealt out in turn, those count that so many batches hold in one process.
    """
    batch_sampler = loader.batch_sampler
    sampler = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is not BatchSampler or not isinstance(sampler, DistributedSampler):
        return None
    if (sampler.rank, sampler.num_replicas) != (rank, num_ranks):
        return None
    num_samples = len(cast(Sized, sampler.dataset))
    if type(sampler).__iter__ is DistributedSampler.__iter__:
        end = num_samples if max_batches is None else min(max_batches * batch_sampler.batch_size, num_samples)
        return DealtShare(rank, num_ranks, end)
    shares = _shares(sampler, loader, num_samples)
    if shares is None:
        return None
    return WorkedOutShare(rank, shares)


def _shares(
    sampler: DistributedSampler[Any], loader: DataLoader[Any], num_samples: int
) -> list[npt.NDArray[np.int64]] | None:
    """What copies of the sampler yield for all ranks; None where they can't stand for the other ranks' samplers."""
    if num_samples * sampler.num_replicas > _MOST_WORKED_OUT:
        return None
    shares = []
    try:
        with preserved_rng() as draws, NoCollectives():  # type: ignore[no-untyped-call]
            for rank in range(sampler.num_replicas):
                other = copied_sampler(sampler, loader)
                before = _states(other)
                other.rank = rank
                shares.append(np.array([int(index) for index in other], dtype=np.int64))
                # Another rank's generators may be in another state.
                if before is None or before != _states(other):
                    return None
    except Exception:  # of any kind: a sampler of the user's
        return None
    # Shares that leave something out may be this rank's own again and again.
    num_read = num_samples - (sampler.num_replicas - 1 if sampler.drop_last else 0)
    return None if draws.any or len(set(np.concatenate(shares).tolist())) < num_read else shares


def copied_sampler(sampler: Any, loader: DataLoader[Any]) -> Any:
    """A copy of a sampler, or sampler of batches, that shares nothing with it but datasets."""
    inner = getattr(sampler, "sampler", None)
    owners = [owner for owner in (sampler, inner) if not isinstance(owner, DistributedSamplerWrapper)]
    held = [value for owner in owners if hasattr(owner, "__dict__") for value in vars(owner).values()]
    shared = [loader.dataset, *(value for value in held if isinstance(value, Dataset))]
    return copy.deepcopy(sampler, {id(value): value for value in shared})


def _states(sampler: Any) -> bytes | None:
    return content_hash([state_of(generator) for generator in generators_in([sampler])])


class NoCollectives(TorchDispatchMode):
    """Raises where ranks would have to work together."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("Expected a sampler to yield indices by itself, but it calls the other ranks.")
        return func(*args, **(kwargs or {}))
