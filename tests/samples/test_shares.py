"""Shares of ranks that are known beforehand, against what the samplers of all ranks really yield."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lit_cka.samples.shares import DealtShare, WorkedOutShare, copied_sampler, known_share
from tests.samples.sample_data import numbered
from tests.samples.samples_worker import Asking, AtRandom, ByParity, Contiguous, ContiguousEarly, InPlace, N


class Blocks(DistributedSampler[Any]):
    """Shares in blocks of two, shuffled, the end filled up with whatever comes first."""

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        order = [order[i % n] for i in range(2 * self.num_replicas * -(-n // (2 * self.num_replicas)))]
        return iter([i for k in range(self.rank, len(order) // 2, self.num_replicas) for i in order[2 * k : 2 * k + 2]])


class OwnGenerator(Contiguous):
    """Shuffles by a generator that may be in another state on other ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator = random.Random(self.rank)

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        self.generator.shuffle(indices)
        return iter(indices)


class Hard(DistributedSampler[Any]):
    """Yields the even samples alone."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, N, 2)[self.rank :: self.num_replicas])


class GloballyShuffled(Contiguous):
    """Shuffles its share, differently on each rank."""

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        random.shuffle(indices)
        return iter(indices)


def share_of(sampler: Any, batch_size: int, **options: Any) -> DealtShare | WorkedOutShare | None:
    drop_last = options.pop("drop_last", False)
    loader = DataLoader(sampler.dataset, batch_size, sampler=sampler, drop_last=drop_last)
    return known_share(loader, sampler.rank, sampler.num_replicas, options.pop("most", None))


def counts(samplers: list[Any], batch_size: int, num_batches: float = float("inf"), **options: Any) -> list[int]:
    """What the ranks count together, of all batches that they really read."""
    counted = []
    for sampler in samplers:
        share = share_of(sampler, batch_size, **options)
        assert share is not None
        start = 0
        for number, batch in enumerate(BatchSampler(sampler, batch_size, options.get("drop_last", False))):
            if number < num_batches:
                indices = np.array(batch)
                mask = share.counted(indices, start)
                assert mask is not None
                counted += indices[mask].tolist()
                start += len(batch)
    return counted


CASES = list(itertools.product((1, 2, 3, 5, 8, 13), (1, 2, 3, 5), (1, 3)))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [DistributedSampler, Blocks])
def test_each_sample_counts_once(kind: Any, shuffle: bool) -> None:
    for n, num_ranks, batch_size in CASES:
        data = numbered(n)
        samplers = [kind(data, num_ranks, rank, shuffle=shuffle) for rank in range(num_ranks)]
        for sampler in samplers:
            sampler.set_epoch(n)
        assert sorted(counts(samplers, batch_size)) == list(range(n)), (n, num_ranks, batch_size)
        held = {i for each in samplers for i in list(each)[: 2 * batch_size]}
        assert sorted(counts(samplers, batch_size, num_batches=2)) == sorted(held), (n, num_ranks, batch_size)
        held = {i for each in samplers for batch in BatchSampler(each, batch_size, True) for i in batch}
        assert sorted(counts(samplers, batch_size, drop_last=True)) == sorted(held), (n, num_ranks, batch_size)


def test_the_samples_that_so_many_batches_hold_in_one_process() -> None:
    for (n, num_ranks, batch_size), most in itertools.product(CASES, (1, 2, 4)):
        data = numbered(n)
        samplers = [DistributedSampler(data, num_ranks, rank, seed=n) for rank in range(num_ranks)]
        alone = list(DistributedSampler(data, 1, 0, seed=n))
        assert sorted(counts(samplers, batch_size, most=most)) == sorted(alone[: most * batch_size])


def test_equal_indices_count_where_they_come_first() -> None:
    shares = [np.array(share) for share in ([4, 1, 1, 2], [3, 4, 5], [4, 2])]
    counted = [WorkedOutShare(rank, shares).counted(share, 0) for rank, share in enumerate(shares)]
    assert [mask.tolist() for mask in counted if mask is not None] == [[1, 1, 0, 0], [1, 0, 1], [0, 1]]
    assert WorkedOutShare(0, shares).counted(np.array([1, 1]), 1).tolist() == [True, False]  # type: ignore[union-attr]
    for other, start in (([4, 2], 0), ([1, 4], 0), ([2, 7], 3)):
        assert WorkedOutShare(0, shares).counted(np.array(other), start) is None
    assert WorkedOutShare(0, shares).counted(["a"], 0) is None


@pytest.mark.parametrize("kind", [ContiguousEarly, AtRandom, Asking, OwnGenerator, GloballyShuffled, Hard])
def test_what_cannot_be_worked_out_for_other_ranks(kind: Any) -> None:
    for rank in range(3):
        assert share_of(kind(numbered(N), 3, rank), 4) is None


def test_what_is_not_shared_out_by_torchs_samplers() -> None:
    data = numbered(N)
    sampler = DistributedSampler(data, 3, 1)
    others = [
        DataLoader(data, 4),
        DataLoader(data, batch_sampler=[[1, 2]]),
        DataLoader(data, batch_sampler=ByParity(sampler, 4, False)),
        DataLoader(data, batch_size=None, sampler=sampler),
    ]
    for other in others:
        assert known_share(other, 1, 3, None) is None
    for rank, num_ranks in ((0, 3), (1, 2), (1, 4)):  # each rank has all, or ranks share a model
        assert known_share(DataLoader(data, 4, sampler=sampler), rank, num_ranks, None) is None


@pytest.mark.parametrize("kind", [Contiguous, InPlace, Blocks, AtRandom, OwnGenerator])
def test_working_out_a_share_changes_nothing(kind: Any) -> None:
    orders = []
    for asked in (False, True):
        torch.manual_seed(0), random.seed(0)
        sampler = kind(numbered(N), 3, 1)
        orders.append([])
        for _ in range(2):
            if asked:
                share_of(sampler, 4)
            orders[-1].append(list(sampler))
    assert orders[0] == orders[1]


def test_a_wrapped_sampler_keeps_its_order() -> None:
    """Lightning's wrapper draws the order anew for each iteration, and keeps it for the one that runs."""
    sampler = DistributedSamplerWrapper(torch.utils.data.RandomSampler(range(N)), 2, 1, shuffle=False)
    iterator = iter(sampler)
    first = next(iterator)
    order = list(sampler.dataset._sampler_list)
    expected = [*order, order[0]][1::2]
    assert known_share(DataLoader(numbered(N), 4, sampler=sampler), 1, 2, None) is None
    assert [first, *iterator] == expected


def test_copies_of_samplers_share_the_dataset_alone() -> None:
    data = numbered(N)
    sampler = BatchSampler(InPlace(data, 3, 1), 4, False)
    copied = copied_sampler(sampler, DataLoader(data, batch_sampler=sampler))
    assert copied.sampler is not sampler.sampler
    assert copied.sampler.dataset is data
    assert copied.sampler.indices is not sampler.sampler.indices
