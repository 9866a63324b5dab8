"""Rows are read as the features that they stand for, wherever the blocks begin and whatever they are measured from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional.rows import Rows
from lit_cka.functional.units import unit_exponent
from tests.oracles import float64, paired_features


def in_blocks(X: Tensor, sizes: list[int]) -> Rows:
    """Blocks in turn as they are, and as offsets in float32 about a point near by."""
    blocks, origins = list(X.split(sizes)), []
    for index, block in enumerate(blocks):
        origin = block.mean(dim=0) if index % 2 and len(block) else None
        blocks[index] = block if origin is None else (block - origin).to(torch.float32)
        origins.append(origin)
    return Rows(blocks, origins)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [0, 1, 4, 0, 7, 0]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_any_part_can_be_read(sizes: list[int], scale: float) -> None:
    X, _ = paired_features(12, 5, 1, offset=1e4)
    point = torch.arange(5.0, dtype=torch.float64) * 1e3
    rows = in_blocks(X, sizes)
    moved = rows.measured_from(point, scale)
    assert (len(rows), rows.width) == (len(moved), moved.width) == (12, 5)
    for start, stop in itertools.combinations(range(13), 2):
        for first, last in [(0, None), (0, 9), (1, 3), (4, 5)]:
            part = X[start:stop, first:last]
            read, read_moved = rows.read(start, stop, first, last), moved.read(start, stop, first, last)
            assert read.dtype == torch.float64
            torch.testing.assert_close(read, part, rtol=0, atol=1e-6)  # of float32 offsets
            torch.testing.assert_close(read_moved, scale * (part - point[first:last]), rtol=0, atol=1e-6)
    assert torch.equal(in_blocks(X, [12]).read(3, 99), X[3:])


def test_blocks_in_turn_may_be_measured_from_one_point_or_another() -> None:
    X, Y = paired_features(12, 5, 5, offset=1e4)
    a, b = X[0], Y[0]
    origins = [a, a, None, a, b, b]
    blocks = [x if origin is None else x - origin for x, origin in zip(X.split(2), origins, strict=True)]
    rows = Rows(blocks, origins)
    for start, stop in itertools.combinations(range(13), 2):
        torch.testing.assert_close(rows.read(start, stop), X[start:stop], rtol=0, atol=1e-10)
        moved = rows.measured_from(b, 0.5).read(start, stop)
        torch.testing.assert_close(moved, (X[start:stop] - b) / 2, rtol=0, atol=1e-10)


def test_the_point_is_subtracted_before_rounding_to_float32() -> None:
    X, _ = paired_features(12, 5, 1, offset=1e6)
    rows = Rows([X]).measured_from(X.mean(dim=0), 2.0)
    read = rows.read(0, 12, dtype=torch.float32)
    assert read.dtype == torch.float32
    np.testing.assert_allclose(read, 2 * (float64(X) - float64(X).mean(axis=0)), rtol=1e-7, atol=1e-8)


def test_what_is_read_is_no_part_of_the_blocks() -> None:
    X, _ = paired_features(4, 3, 1)
    before = X.clone()
    Rows([X]).read(0, 4).zero_()
    Rows([X]).squares()
    assert torch.equal(X, before)


@pytest.mark.parametrize("n", [1, 7, 20000])
def test_mean_size_and_squared_norms(n: int) -> None:
    """Of more rows than are read at a time, too."""
    X, _ = paired_features(n, 6, 1, offset=1e4)
    rows = Rows(X.split(3000))
    mean, size = rows.mean_and_size()
    np.testing.assert_allclose(mean, float64(X).mean(axis=0), rtol=1e-13)
    assert size == pytest.approx(np.abs(float64(X) - float64(X)[0]).max() if n > 1 else np.abs(float64(X)).max())
    centred = float64(X) - float64(X).mean(axis=0)
    norms, of_features = rows.measured_from(mean).squares()
    np.testing.assert_allclose(norms, (centred**2).sum(axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(of_features, (centred**2).sum(axis=0), rtol=1e-9, atol=1e-9)


def test_no_rows() -> None:
    rows = Rows([torch.zeros(0, 3)])
    mean, size = rows.mean_and_size()
    assert (mean.tolist(), size) == ([0.0] * 3, 0.0)
    assert [each.shape for each in rows.squares()] == [(0,), (3,)]
    assert rows.read(0, 5).shape == (0, 3)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_constants_centre_to_exact_zeros(value: float) -> None:
    """The mean of thirty times 0.1 is not 0.1 in floating point."""
    rows = Rows([torch.full((30, 4), value, dtype=torch.float64)])
    mean, _ = rows.mean_and_size()
    assert not rows.measured_from(mean).read(0, 30).any()


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e-9, 1e9, 1e200, 1.7e308])
def test_far_magnitudes_are_brought_near_to_one(size: float) -> None:
    assert 1e-10 < size * 2.0 ** -unit_exponent(size) < 1e8


@pytest.mark.parametrize("size", [0.0, 1e-5, 1.0, 1e5, float("inf"), float("nan")])
def test_no_other_unit_where_none_is_needed_or_of_use(size: float) -> None:
    assert unit_exponent(size) == 0
