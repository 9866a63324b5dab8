"""Keys of samples and rows: the same for the same sample wherever it is, never those of another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.samples.batch_rows import RowOrder, rows_of
from lit_cka.samples.sample_keys import BatchSamples, joined_keys, keys_of_hashes, keys_of_indices, row_keys

FINGERPRINT = -(2**63) + 5


def keys(*indices: int, dataset: int = FINGERPRINT) -> Tensor:
    of_indices = keys_of_indices(np.array(indices, dtype=np.int64), dataset)
    assert of_indices is not None
    return of_indices


def distinct(*many: Tensor | None) -> int:
    return len({tuple(key) for each in many if each is not None for key in each.tolist()})


def test_keys_tell_indices_datasets_and_kinds_apart() -> None:
    assert keys(3, 4).shape == (2, 2)
    assert keys(3, 4).dtype == torch.int64
    assert torch.equal(keys(3, 4), keys(4, 3)[[1, 0]])
    assert distinct(keys(3, 4), keys(4, 3)) == 2
    assert distinct(keys(3), keys(3, dataset=FINGERPRINT + 4), keys(3, dataset=0)) == 3
    # A hash with the very words of a key by index.
    twin = keys_of_hashes([keys(3).numpy().tobytes()])
    assert twin[0, 0] == keys(3)[0, 0]
    assert distinct(keys(3), twin) == 2


def test_indices_may_be_anything_with_content() -> None:
    names = keys_of_indices(["a", ("b", 3), 4], 1)
    assert names is not None
    same = keys_of_indices([("b", 3)], 1)
    assert same is not None
    assert torch.equal(same[0], names[1])
    assert distinct(names, keys_of_indices([("b", 4), "a"], 2), keys(4, dataset=1)) == 6
    assert keys_of_indices(["a", object()], 1) is None


def test_several_rows_of_a_sample_are_its_own() -> None:
    """Wherever the sample is in a batch of whichever size, if it is known how the rows lie."""
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for indices, order in itertools.product(([0, 1, 2], [2, 0], [1]), ("by sample", "by part")):
        n, m = len(indices), 4
        rows = row_keys(keys(*indices), n * m, order)
        assert distinct(rows) == n * m
        for row, key in enumerate(rows.tolist()):
            place = (indices[row // m], row % m) if order == "by sample" else (indices[row % n], row // n)
            assert seen.setdefault(place, tuple(key)) == tuple(key)
    assert len(seen) == len(set(seen.values())) == 12
    assert torch.equal(row_keys(keys(1), 4, None), row_keys(keys(1), 4, "by sample"))


def test_rows_of_an_unknown_order_are_those_of_the_same_batch_alone() -> None:
    rows = row_keys(keys(0, 1, 2), 12, None)
    assert torch.equal(rows, row_keys(keys(0, 1, 2), 12, None))
    others = [keys(1, 0, 2), keys(0, 1), keys(0, 1, 2, dataset=9)]
    assert distinct(rows, *(row_keys(other, 12, None) for other in others)) == 4 * 12
    assert distinct(rows, row_keys(keys(0, 1, 2), 13, None), row_keys(keys(0, 1, 2), 12, "by sample")) == 37
    assert torch.equal(row_keys(keys(0, 1, 2), 3, None), keys(0, 1, 2))
    assert row_keys(keys(0, 1, 2), 0, None).shape == (0, 2)
    with pytest.raises(ValueError, match="Expected a batch without samples to give no rows, but got 3"):
        row_keys(keys(), 3, None)


def test_rows_made_of_samples_of_several_dataloaders() -> None:
    pairs = joined_keys([(0, keys(0, 1)), (1, keys(0, 1))])
    assert pairs.shape == (2, 2)
    others = [
        joined_keys([(0, keys(0, 1)), (1, keys(1, 0))]),
        joined_keys([(1, keys(0, 1))]),
        joined_keys([(0, keys(0, 1))]),
        keys(0, 1),
    ]
    assert distinct(pairs, *others) == 10


COUNTED = {"by sample": [1, 1, 0, 0], "by part": [1, 0, 1, 0], None: [1, 1, 1, 1]}


@pytest.mark.parametrize("order", list(COUNTED))
def test_which_rows_count(order: RowOrder | None) -> None:
    shapes = {"by sample": torch.zeros(2, 2, 5), "by part": [torch.zeros(2, 1, 5)] * 2, None: torch.zeros(2, 5)}
    samples = BatchSamples("index", keys(0, 1), torch.tensor([True, False]), rows_of(shapes[order]))
    assert samples.row_counted(4).tolist() == [bool(value) for value in COUNTED[order]]  # type: ignore[union-attr]
    assert samples.row_counted(2).tolist() == [True, False]  # type: ignore[union-attr]
    assert torch.equal(samples.row_keys(4), row_keys(keys(0, 1), 4, order))  # type: ignore[arg-type]
    none_counts = BatchSamples("index", keys(0, 1), torch.zeros(2, dtype=torch.bool), rows_of(shapes[order]))
    assert not none_counts.row_counted(4).any()  # type: ignore[union-attr]


def test_samples_that_are_not_known() -> None:
    samples = BatchSamples("unknown", keys(), torch.zeros(0, dtype=torch.bool), rows_of({}))
    assert samples.row_keys(3) is None
    assert samples.row_counted(3).tolist() == [False] * 3  # type: ignore[union-attr]
    assert BatchSamples("index", keys(0), None, rows_of({})).row_counted(3) is None
