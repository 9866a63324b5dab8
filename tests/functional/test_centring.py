"""Centring against NumPy's extended precision, and where features begin to count as constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import cka_from_moments, cka_matrix, linear_cka, paired_moments
from lit_cka.functional.centring import (
    ROUNDING,
    about_mean,
    centred,
    double_centred,
    is_constant,
    is_rounding,
    mean_over_samples,
)

EPS = 2.0**-52
OFFSETS = pytest.mark.parametrize("offset", [0.0, 3.0, 1e4, -1e6])


def features(n: int, d: int, offset: float) -> Tensor:
    return offset + torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def about_one(units: int, n: int = 10, d: int = 3) -> Tensor:
    """Features whose mean is exactly 1, half of the samples so many units in the last place above, half below."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)[:, None].expand(n, d)
    return 1 + signs * units * EPS


@OFFSETS
def test_the_mean_and_what_is_measured_from_it(offset: float) -> None:
    X = features(37, 5, offset)
    exact = X.numpy().astype(np.longdouble)
    np.testing.assert_allclose(mean_over_samples(X), exact.mean(0), rtol=2 * EPS, atol=4 * EPS)
    # As exact as the offset features themselves are: nothing more is lost.
    np.testing.assert_allclose(about_mean(X), exact - exact.mean(0), rtol=0, atol=4 * EPS * max(abs(offset), 4))
    torch.testing.assert_close(centred(X), about_mean(X), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_is_centred_in_float64(dtype: torch.dtype) -> None:
    X = features(20, 4, 100.0).to(dtype)
    expected = X.double() - X.double().mean(0)
    for function in (about_mean, centred):
        assert function(X).dtype == torch.float64
        torch.testing.assert_close(function(X), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.1, 1e5 / 3, -7.7e-9])
def test_constant_columns_centre_to_exact_zeros(value: float) -> None:
    X = torch.cat([torch.full((37, 1), value, dtype=torch.float64), features(37, 1, 0.0)], dim=1)
    assert not about_mean(X)[:, 0].any()
    assert mean_over_samples(X)[0].item() == value


def test_many_sets_of_features_are_centred_one_by_one() -> None:
    Xs = torch.stack([features(8, 3, offset) for offset in (0.0, 1e3, -5.0)])
    torch.testing.assert_close(about_mean(Xs), torch.stack([about_mean(X) for X in Xs]), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
@pytest.mark.parametrize(("units", "constant"), [(0, True), (1, True), (15, True), (17, False), (1000, False)])
def test_features_are_constant_up_to_sixteen_units_in_the_last_place(units: int, constant: bool, scale: float) -> None:
    X = scale * about_one(units)
    assert bool((centred(X) == 0).all()) is constant
    x = X.numpy().astype(np.longdouble)
    mean = x.mean(0)
    squares = ((x - mean) ** 2).sum(0)
    assert bool((squares <= (16 * EPS) ** 2 * len(x) * mean**2).all()) is constant
    assert bool(is_constant(torch.from_numpy(squares.astype(float)), len(x), X[0])) is constant


@pytest.mark.parametrize(("columns", "constant"), [((1e-17, 1.0), True), ((1.0, 1e15), False), ((1.0, 1e100), False)])
def test_one_feature_speaks_for_the_others_only_if_it_is_usual(columns: tuple[float, float], constant: bool) -> None:
    """What varies beside six constant features: rounding of numbers of their size, or as much as there is."""
    varying, others = columns
    X = torch.full((10, 7), others, dtype=torch.float64)
    if not constant:
        X[:, 1:6] = 0.25
    X[:, 0] = varying * features(10, 1, 0.0)[:, 0]
    assert bool((centred(X) == 0).all()) is constant
    Y = features(10, 4, 3.0)
    for debiased in (False, True):
        alone = linear_cka(X[:, :1], Y, debiased=debiased)
        for value in (linear_cka(X, Y, debiased=debiased), cka_matrix([X], [Y], debiased=debiased)[0, 0]):
            assert value.isnan() if constant else value.item() == pytest.approx(alone.item(), abs=1e-12)
        moments = paired_moments(X, Y)
        assert bool(cka_from_moments(moments, debiased=debiased).isnan()) is constant


def test_features_about_zero_are_constant_only_if_they_are_zero() -> None:
    X = features(10, 3, 0.0)
    X = X - X.mean(0)
    torch.testing.assert_close(centred(1e-150 * X), 1e-150 * X, rtol=1e-9, atol=1e-160)
    assert not centred(torch.zeros(10, 3)).any()


def test_features_that_are_not_finite_are_not_constant() -> None:
    assert centred(torch.tensor([[1.0, torch.nan], [1.0, 2.0]])).isnan().any()


def test_rounding_is_sixteen_units_in_the_last_place() -> None:
    assert ROUNDING == 16 * EPS
    rest = torch.tensor([0.0, 16 * EPS, 17 * EPS, torch.nan], dtype=torch.float64)
    assert is_rounding(rest, torch.ones(())).tolist() == [True, True, False, False]


@OFFSETS
def test_double_centring_is_h_k_h(offset: float) -> None:
    A = features(9, 9, 0.0)
    K = offset + A @ A.T
    H = np.eye(9) - 1 / 9
    expected = H @ (A @ A.T).numpy() @ H
    np.testing.assert_allclose(double_centred(K), expected, rtol=0, atol=1e-14 * max(abs(offset), 10))
    stacked = double_centred(torch.stack([K, 2 * K]))
    torch.testing.assert_close(stacked[1], 2 * double_centred(K), rtol=1e-12, atol=1e-12)


def test_a_matrix_whose_entries_are_equal_but_for_rounding_centres_to_zeros() -> None:
    K = torch.full((6, 6), 0.7, dtype=torch.float64)
    assert not double_centred(K).any()
    K[2, 3] += 4 * EPS
    assert not double_centred(K).any()
    K[2, 3] += 1e-12
    assert double_centred(K).any()
