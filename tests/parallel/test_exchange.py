"""What ranks exchange goes in as few collectives as its size allows; see also `tests/tracking/statistics_worker.py`."""

from __future__ import annotations

import pytest
import torch

from lit_cka.parallel.exchange import Group, in_buckets


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([3, 3, 4], [[0, 1, 2]]),
        ([3, 3, 4, 1], [[0, 1, 2], [3]]),
        ([11, 1, 10, 0, 20], [[0], [1], [2, 3], [4]]),
    ],
    ids=str,
)
def test_buckets_hold_as_much_as_they_may(sizes: list[int], buckets: list[list[int]]) -> None:
    assert list(in_buckets(range(len(sizes)), sizes, limit=10)) == buckets


def test_a_process_alone_is_a_group() -> None:
    group = Group.of()
    assert group == Group(0, 1, None)
    tensors = [torch.ones(3), torch.ones(0, 2)]
    assert all(map(torch.equal, group.add_up(tensors), tensors))
    assert group.gather_integers([[1, 2], [3, 4]], torch.device("cpu")) == [[[1, 2], [3, 4]]]
