"""Rows of features come back as they were added: by position, from memory or a file, across gaps and pivots."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_cka.reference import feature_store
from lit_cka.reference.feature_store import FeatureStore, MappedFile

CPU = torch.device("cpu")


def rows(n: int, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) + 1e4  # far from 0, for their spread


@pytest.mark.parametrize("sizes", [[7], [4, 3], [1, 1, 5], [0, 4, 0, 3]], ids=str)
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_by_position(
    tmp_path: Path, sizes: list[int], in_file: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_SEGMENT_BYTES", 50)
    X, store = rows(7), FeatureStore(dtype)
    file = MappedFile(tmp_path) if in_file else None
    for part in X.split(sizes):
        store.add(part, file)
    assert len(store) == 7
    assert store.width == 3
    for positions in ([0, 1, 2, 3, 4, 5, 6], [6, 0, 3], [4, 4], [], [0, 1, 2, 3], [2]):
        found = store.rows(torch.tensor(positions, dtype=torch.int64), CPU)
        tolerance = 0 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found, X[positions], rtol=0, atol=max(tolerance, 1e-11))
    for start, stop in itertools.combinations(range(8), 2):
        assert store.has_all(range(start, stop))
        found = store.offsets(range(start, stop)).double() + store.pivot
        torch.testing.assert_close(found, X[start:stop], rtol=0, atol=max(tolerance, 1e-11))
    assert not store.has_all(range(6, 8))
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_gaps_are_found_nowhere() -> None:
    X, store = rows(5), FeatureStore(torch.float64)
    store.add(X[:2])
    store.skip_to(4)
    store.add(X[2:])
    store.skip_to(9)
    assert store.gaps == [(2, 4), (7, 9)]
    positions = store.mask_gaps(torch.arange(11), -7)
    assert positions.tolist() == [0, 1, -7, -7, 4, 5, 6, -7, -7, -7, -7]
    torch.testing.assert_close(store.rows(torch.tensor([6, 1, 4]), CPU), X[[4, 1, 2]])
    assert not store.has_all(range(1, 5))


def test_what_several_processes_have_recorded_is_put_together() -> None:
    first, second = FeatureStore(torch.float64), FeatureStore(torch.float64)
    X = rows(9)
    first.add(X[:3])
    second.add(X[3:5])
    second.skip_to(3)
    second.add(X[5:] + 0)
    together = FeatureStore(torch.float64)
    for each in (first, second):
        together.extend(each.blocks, each.pivot, each.gaps)
    assert together.gaps == [(5, 6)]
    torch.testing.assert_close(together.rows(torch.tensor([0, 2, 3, 4, 6, 9]), CPU), X[[0, 2, 3, 4, 5, 8]])


def test_another_width_is_refused() -> None:
    store = FeatureStore()
    store.add(rows(3))
    with pytest.raises(ValueError, match="3 wide before, and now are 4"):
        store.add(rows(3, width=4))


def test_whether_all_is_finite() -> None:
    store, X = FeatureStore(), rows(3)
    store.add(X)
    assert store.is_finite
    X[1, 1] = torch.inf
    store.add(X)
    assert not store.is_finite


def test_a_store_without_rows_has_none_of_any_width() -> None:
    assert FeatureStore().rows(torch.tensor([0, 1]), CPU).shape == (2, 0)


def test_fewer_bits_are_about_the_pivot() -> None:
    X, store = rows(50), FeatureStore()
    store.add(X)
    store.round_to(torch.bfloat16)
    found = store.rows(torch.arange(50), CPU)
    spread = (X - X.mean(0)).abs().max()
    assert 0 < (found - X).abs().max() < spread / 128
