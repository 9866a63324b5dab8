"""A layer's samples on one rank: what they are kept as, and that others are told the same of rows and moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_cka.functional.moments import paired_moments
from lit_cka.statistics.paired_samples import PairedSamples
from tests.oracles import float64, paired_features

CPU = torch.device("cpu")
# Rows alone, moments alone, and moments with rows that came later.
PASSES = pytest.mark.parametrize("sizes", [[30, 7], [1030], [600, 600, 50]], ids=str)


def added(sizes: list[int], scale: float = 1.0, **options: bool) -> tuple[PairedSamples, torch.Tensor, torch.Tensor]:
    X, Y = paired_features(sum(sizes), 5, 4, offset=1e3)
    X = X * scale
    samples = PairedSamples(**options)
    for x, y in zip(X.split(sizes), Y.split(sizes), strict=True):
        samples.add(x, y)
    return samples, X, Y


@PASSES
@pytest.mark.parametrize("scale", [1.0, 2.0**100])
@pytest.mark.parametrize("exponents", [(0, 0), (3, -2), (100, 0)])
def test_moments_are_in_the_unit_that_is_asked_for(sizes: list[int], scale: float, exponents: tuple[int, int]) -> None:
    samples, X, Y = added(sizes, scale)
    samples.summary(CPU)
    moments = samples.moments(CPU, exponents)
    assert moments is not None
    expected = paired_moments(X * 2.0 ** -exponents[0], Y * 2.0 ** -exponents[1])._asdict()
    for name, value in moments._asdict().items():
        size = float(expected[name].abs().max())
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-9 * size, err_msg=name)


@PASSES
@pytest.mark.parametrize("scale", [1.0, 2.0**100])
def test_the_summary(sizes: list[int], scale: float) -> None:
    samples, X, Y = added(sizes, scale)
    summary = samples.summary(CPU)
    assert summary[:3] == (sum(sizes), 5, 4)
    assert (80 < summary.exponent_x < 120) == (scale != 1)
    assert summary.exponent_y == 0
    np.testing.assert_allclose(summary.mean_x, float64(X).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(summary.mean_y, float64(Y).mean(axis=0), rtol=1e-12)


@PASSES
def test_sums_over_the_reference_may_be_left_out(sizes: list[int]) -> None:
    samples, _, _ = added(sizes, with_yy=False)
    samples.summary(CPU)
    moments = samples.moments(CPU, (0, 0))
    assert moments is not None
    assert moments.yy.numel() == moments.by.numel() == 0


@pytest.mark.parametrize("size", [3, 400], ids=["rows", "moments"])
def test_what_is_measured_from_an_origin_is_what_it_stands_for(size: int) -> None:
    """Batches of all kinds in turn: the order of both sides is the same, whatever was joined meanwhile."""
    X, Y = paired_features(4 * size, 5, 4, offset=1e3)
    samples = PairedSamples()
    for i, (x, y) in enumerate(zip(X.split(size), Y.split(size), strict=True)):
        origin = y.mean(dim=0) if i % 2 else None
        samples.add(x, y if origin is None else y - origin, origin)
    samples.summary(CPU)
    moments, expected = samples.moments(CPU, (0, 0)), paired_moments(X, Y)
    assert moments is not None
    for name, value in moments._asdict().items():
        wanted = getattr(expected, name)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()), err_msg=name)


def test_features_that_are_measured_from_an_origin_are_not_copied() -> None:
    X, Y = paired_features(8, 5, 4)
    samples = PairedSamples()
    samples.add(X, Y, torch.ones(4))
    assert samples.rows()[1].blocks[0].data_ptr() == Y.data_ptr()


def test_scoring_takes_no_more_than_what_comes_later_is_added_to() -> None:
    """Rows that are few stay, whose products are in another order otherwise, and moments are not held twice."""
    samples, X, Y = added([30, 7])
    first = samples.summary(CPU)
    samples.add(X, Y)
    assert (first.n, samples.summary(CPU).n) == (37, 74)
    moments, expected = samples.moments(CPU, (0, 0)), paired_moments(torch.cat([X, X]), torch.cat([Y, Y]))
    assert moments is not None
    torch.testing.assert_close(moments.xy, expected.xy, rtol=1e-9, atol=0)


def test_no_samples() -> None:
    samples = PairedSamples()
    assert samples.summary(CPU)[:5] == (0, 0, 0, 0, 0)
    assert samples.moments(CPU, (0, 0)) is None
    samples.add(torch.ones(0, 5), torch.ones(0, 4))
    assert samples.summary(CPU)[:5] == (0, 5, 4, 0, 0)
    assert samples.summary(CPU).mean_x.shape == (5,)


@pytest.mark.parametrize(
    ("features", "kept"),
    [
        (torch.linspace(0, 1, 8 * 10**5).reshape(100, -1), torch.float32),
        (torch.linspace(0, 1, 8 * 10**5).reshape(100, -1).double(), torch.float32),
        (torch.linspace(0, 1, 8 * 10**5, dtype=torch.float64).reshape(100, -1), torch.float32),
        (torch.linspace(0, 1e50, 8 * 10**5, dtype=torch.float64).reshape(100, -1), torch.float64),
        (torch.linspace(0, 1, 12 * 10**5).reshape(100, -1).bfloat16(), torch.bfloat16),
    ],
    ids=["float32", "float64 with float32's digits", "float64", "too large for float32", "bfloat16"],
)
def test_what_rows_are_kept_as(features: torch.Tensor, kept: torch.dtype) -> None:
    samples = PairedSamples()
    for batch in features.split(50):
        samples.add(batch + 0, batch + 0)
    X, Y = samples.rows()
    assert {block.dtype for rows in (X, Y) for block in rows.blocks} == {kept}
    atol = 1e-7 if features.dtype == torch.float64 and not torch.equal(features.float().double(), features) else 0
    torch.testing.assert_close(X.read(0, 100), features.double(), rtol=0, atol=atol)
    few = PairedSamples()
    few.add(features[:1], features[:1])
    assert few.rows()[0].blocks[0].dtype == features.dtype
