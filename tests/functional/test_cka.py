"""CKA and HSIC against their n x n forms, their invariances, and what they say of degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import (
    cka_from_gram,
    cka_from_moments,
    hsic,
    linear_cka,
    linear_gram,
    paired_moments,
    pairwise_hsic,
    rbf_gram,
)
from tests import oracles
from tests.oracles import paired_features

ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
SHAPES = pytest.mark.parametrize(
    ("n", "d_x", "d_y"),
    [(40, 6, 3), (40, 3, 6), (12, 30, 20), (12, 20, 5), (12, 5, 20), (12, 12, 12), (4, 2, 3), (4, 9, 7)],
)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


@ESTIMATORS
@SHAPES
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float64), (3.0, torch.float64), (1e4, torch.float32)])
def test_linear_cka_equals_the_kernel_form(
    n: int, d_x: int, d_y: int, related: bool, offset: float, dtype: torch.dtype, debiased: bool
) -> None:
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, dtype=dtype)
    expected = oracles.linear_cka(X, Y, debiased)
    assert linear_cka(X, Y, debiased=debiased).item() == pytest.approx(expected, abs=1e-9)
    assert cka_from_moments(paired_moments(X, Y), debiased=debiased).item() == pytest.approx(expected, abs=1e-9)


@ESTIMATORS
@pytest.mark.parametrize(("n", "d"), [(200, 16), (24, 60)], ids=["moments", "gram"])
def test_means_ten_thousand_times_the_spread(n: int, d: int, debiased: bool) -> None:
    """The target of the design: 1e-6 for float32 features; a lost centring term gives 0.99 instead of about 0."""
    X, Y = paired_features(n, d, d, related=False, offset=1e4, dtype=torch.float32)
    expected = oracles.linear_cka(X, Y, debiased)
    uncentred = oracles.float64(X) @ oracles.float64(X).T, oracles.float64(Y) @ oracles.float64(Y).T
    without_centring = np.sum(uncentred[0] * uncentred[1]) / np.prod([np.linalg.norm(K) for K in uncentred])
    assert without_centring > 0.99 > 0.8 > expected
    assert linear_cka(X, Y, debiased=debiased).item() == pytest.approx(expected, abs=1e-6)


@ESTIMATORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)], ids=["moments", "gram"])
def test_low_precision_features_are_computed_in_float64(dtype: torch.dtype, n: int, d: int, debiased: bool) -> None:
    X, Y = paired_features(n, d, d + 1, dtype=dtype)
    value = linear_cka(X, Y, debiased=debiased)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-10)


@ESTIMATORS
def test_low_precision_features_may_be_mixed_with_others(debiased: bool) -> None:
    X, Y = paired_features(30, 4, 5)
    X, Y = X.bfloat16(), Y.float()
    assert linear_cka(X, Y, debiased=debiased).item() == pytest.approx(oracles.linear_cka(X, Y, debiased), abs=1e-10)


def test_the_debiased_estimator_removes_the_drift_to_one() -> None:
    """Over independent features its mean is 0 within three standard errors, where the plain one's is above 0.8."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 10, 100, generator=generator) for _ in range(100)]
    debiased = torch.stack([linear_cka(X, Y, debiased=True) for X, Y in pairs])
    assert debiased.mean().abs() < 3 * debiased.std() / len(pairs) ** 0.5
    assert torch.stack([linear_cka(X, Y) for X, Y in pairs]).mean() > 0.8


@ESTIMATORS
@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)], ids=["moments", "gram"])
def test_invariances(n: int, d: int, debiased: bool) -> None:
    X, Y = paired_features(n, d, d + 2)
    value = linear_cka(X, Y, debiased=debiased)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for name, x, y in [
        ("rotation", X @ rotation(d), Y @ rotation(d + 2)),
        ("scaling", 1e-4 * X, -300 * Y),
        ("translation", X + 17, Y - torch.arange(d + 2)),
        ("order of the samples", X[order], Y[order]),
        ("symmetry", Y, X),
        ("a column that is the same for all", torch.cat([X, torch.full((n, 1), 0.1)], 1), Y),
    ]:
        torch.testing.assert_close(
            linear_cka(x, y, debiased=debiased),
            value,
            rtol=0,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (linear_cka(X * torch.linspace(0.1, 10, d), Y, debiased=debiased) - value).abs() > 1e-3
    assert (linear_cka(X[order], Y, debiased=debiased) - value).abs() > 1e-3


@ESTIMATORS
@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30)], ids=["moments", "gram"])
def test_rotated_features_have_cka_one(n: int, d: int, debiased: bool) -> None:
    X, _ = paired_features(n, d, d)
    assert linear_cka(X, 5 * X @ rotation(d) + 2, debiased=debiased).item() == pytest.approx(1, abs=1e-12)
    assert linear_cka(X, X, debiased=debiased) <= 1


@ESTIMATORS
@pytest.mark.parametrize("scale", [1e-200, 1e-78, 1e78, 1e150])
@pytest.mark.parametrize(("n", "d"), [(60, 6), (12, 30)], ids=["moments", "gram"])
def test_any_magnitude(n: int, d: int, scale: float, debiased: bool) -> None:
    """The fourth powers of the features have no place in float64."""
    X, Y = paired_features(n, d, d + 2)
    expected = oracles.linear_cka(X, Y, debiased)
    assert linear_cka(X * scale, Y, debiased=debiased).item() == pytest.approx(expected, abs=1e-10)
    assert linear_cka(X, Y * scale, debiased=debiased).item() == pytest.approx(expected, abs=1e-10)


def test_uncorrelated_columns_have_cka_zero() -> None:
    X = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]) + 5
    Y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]) - 7
    assert linear_cka(X, Y) == 0


@ESTIMATORS
@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, 1 / 3, 1e6 + 0.1, -1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [30, 7], ids=["moments", "gram"])
def test_constant_features_are_nan(value: float, dtype: torch.dtype, n: int, debiased: bool) -> None:
    X = torch.full((n, 12), value, dtype=dtype)
    Y = paired_features(n, 1, 12)[1]
    assert linear_cka(X, Y, debiased=debiased).isnan()
    assert linear_cka(Y, X, debiased=debiased).isnan()
    assert linear_cka(X, X, debiased=debiased).isnan()
    assert cka_from_moments(paired_moments(X, Y), debiased=debiased).isnan()
    assert cka_from_gram(linear_gram(X), linear_gram(Y), debiased=debiased).isnan()
    assert cka_from_gram(rbf_gram(Y), rbf_gram(X), debiased=debiased).isnan()


@ESTIMATORS
@pytest.mark.parametrize("n", [30, 7], ids=["moments", "gram"])
def test_constants_that_differ_by_rounding_are_nan(n: int, debiased: bool) -> None:
    """The same sample, but summed in another order for some rows: a spread of one unit in the last place."""
    X = torch.linspace(0.1, 3, 12, dtype=torch.float64).repeat(n, 1)
    X[::2] = torch.nextafter(X[::2], torch.tensor(torch.inf, dtype=torch.float64))
    Y = paired_features(n, 1, 12)[1]
    assert linear_cka(X, Y, debiased=debiased).isnan()
    assert linear_cka(Y, X, debiased=debiased).isnan()


@ESTIMATORS
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, 0.0])
def test_a_constant_gram_matrix_is_nan(value: float, debiased: bool) -> None:
    K = torch.full((33, 33), value, dtype=torch.float64)
    assert cka_from_gram(K, linear_gram(paired_features(33, 3, 3)[0]), debiased=debiased).isnan()
    assert hsic(K, K, unbiased=debiased) == 0


@ESTIMATORS
def test_a_gram_matrix_that_is_constant_up_to_rounding_is_nan(debiased: bool) -> None:
    """What `X @ X.T` of constant features, not centred, comes to in float64."""
    rounding = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-16
    K = 0.7 + rounding + rounding.T
    L = linear_gram(paired_features(20, 3, 3)[0])
    assert cka_from_gram(K, L, debiased=debiased).isnan()
    assert cka_from_gram(L, K, debiased=debiased).isnan()


@ESTIMATORS
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_and_large_features_are_not_taken_for_constant(scale: float, debiased: bool) -> None:
    X, Y = paired_features(30, 4, 5)
    value = linear_cka(X, Y, debiased=debiased).item()
    assert linear_cka(scale * X, Y, debiased=debiased).item() == pytest.approx(value, abs=1e-12)


@ESTIMATORS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [30, 7], ids=["moments", "gram"])
@pytest.mark.parametrize("row", [0, 3])
def test_non_finite_features_are_nan(value: float, n: int, row: int, debiased: bool) -> None:
    X, Y = paired_features(n, 12, 12)
    X[row, 2] = value
    assert linear_cka(X, Y, debiased=debiased).isnan()
    assert linear_cka(Y, X, debiased=debiased).isnan()
    assert cka_from_gram(rbf_gram(X), rbf_gram(Y), debiased=debiased).isnan()


@pytest.mark.parametrize("n", [4, 5, 20, 120])
@pytest.mark.parametrize("rotate", [False, True], ids=["one-hot", "rotated"])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_equidistant_samples_have_no_debiased_cka(n: int, rotate: bool, offset: float) -> None:
    """Their Gram matrix is the identity, whose unbiased HSIC with anything is 0, and CKA thus 0 / 0."""
    X = (3 * rotation(n) if rotate else 0.1 * torch.eye(n, dtype=torch.float64)) + offset
    Y = paired_features(n, 3, 3)[0]
    eye = torch.eye(n, dtype=torch.float64)
    assert hsic(eye, eye, unbiased=True) == 0
    assert hsic(eye, linear_gram(Y), unbiased=True) == 0
    assert linear_cka(X, Y, debiased=True).isnan()
    assert linear_cka(torch.cat([X, X], 1), Y, debiased=True).isnan()
    assert cka_from_gram(eye, linear_gram(Y), debiased=True).isnan()
    assert linear_cka(X, Y).item() == pytest.approx(oracles.linear_cka(X, Y, False), abs=1e-10)


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (torch.ones(5), torch.ones(5, 2), r"Expected `X` to be of shape \(samples, features\), but got \(5,\)"),
        (torch.ones(5, 2), torch.ones(5, 2, 3), r"Expected `Y` to be of shape .* got \(5, 2, 3\)"),
        (torch.ones(5, 2).long(), torch.ones(5, 2), r"Expected `X` to be floating point, but got torch.int64"),
        (torch.ones(5, 2), torch.ones(5, 2).bool(), r"Expected `Y` to be floating point, but got torch.bool"),
        (torch.ones(5, 2), torch.ones(4, 2), "Expected `X` and `Y` to hold the same samples .* got 5 and 4 samples"),
    ],
)
def test_wrong_features_are_an_error(X: Tensor, Y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cka(X, Y)
    with pytest.raises(ValueError, match=message):
        paired_moments(X, Y)


@pytest.mark.parametrize(("debiased", "n", "needed"), [(False, 0, 2), (False, 1, 2), (True, 0, 4), (True, 3, 4)])
@pytest.mark.parametrize("d", [1, 9])
def test_too_few_samples_are_an_error(debiased: bool, n: int, needed: int, d: int) -> None:
    name = "debiased" if debiased else "plain"
    message = f"Expected at least {needed} samples for the {name} estimator, but got {n}"
    X, Y = paired_features(n, d, d)
    with pytest.raises(ValueError, match=message):
        linear_cka(X, Y, debiased=debiased)
    with pytest.raises(ValueError, match=message):
        cka_from_gram(torch.ones(n, n), torch.ones(n, n), debiased=debiased)
    with pytest.raises(ValueError, match=message):
        hsic(torch.ones(n, n), torch.ones(n, n), unbiased=debiased)
    assert cka_from_moments(paired_moments(X, Y), debiased=debiased).isnan()


def test_enough_samples_are_no_error() -> None:
    X, Y = paired_features(4, 3, 2)
    assert linear_cka(X[:2], Y[:2]).item() == pytest.approx(1)
    assert linear_cka(X, Y, debiased=True).isfinite()


def test_the_features_need_no_gradient() -> None:
    X, Y = paired_features(9, 3, 2)
    assert not linear_cka(X.requires_grad_(), Y.requires_grad_()).requires_grad
    assert not linear_cka(X[:3], Y[:3]).requires_grad
    assert not hsic(rbf_gram(X), X @ X.T, unbiased=True).requires_grad


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("n", [4, 5, 30])
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
def test_hsic_equals_its_definition(n: int, related: bool, unbiased: bool) -> None:
    """On Gram matrices that are not centred, of different kernels, and on symmetric matrices that are none."""
    X, Y = paired_features(n, 4, 6, related=related)
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    oracle = oracles.unbiased_hsic if unbiased else oracles.biased_hsic
    for K, L in [
        (X @ X.T, Y @ Y.T),
        (X @ X.T, torch.exp(-torch.cdist(Y, Y))),
        ((1 + X @ X.T) ** 2, 0.3 + 0 * Y @ Y.T),
        (noise + noise.T, Y @ Y.T + 2),
    ]:
        expected = oracle(K.numpy(), L.numpy())
        scale = oracle(K.numpy(), K.numpy()) ** 0.5 * max(oracle(L.numpy(), L.numpy()), 0) ** 0.5
        assert hsic(K, L, unbiased=unbiased).item() == pytest.approx(expected, abs=1e-10 * max(scale, 1))


@ESTIMATORS
def test_cka_from_gram_takes_any_kernel(debiased: bool) -> None:
    X, Y = paired_features(15, 4, 6)
    K, L = X @ X.T, torch.exp(-torch.cdist(Y, Y))
    expected = oracles.cka(K.numpy(), L.numpy(), debiased)
    assert cka_from_gram(K, L, debiased=debiased).item() == pytest.approx(expected, abs=1e-12)
    assert cka_from_gram(K.float(), L.float(), debiased=debiased).item() == pytest.approx(expected, abs=1e-5)


@ESTIMATORS
def test_what_is_added_to_a_gram_matrix_is_no_matter(debiased: bool) -> None:
    K, L = (linear_gram(features) for features in paired_features(15, 4, 6))
    expected = oracles.cka(K.numpy(), L.numpy(), debiased)
    assert cka_from_gram(K + 1e8, L - 1e6, debiased=debiased).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
def test_pairwise_hsic_is_hsic_of_every_pair(unbiased: bool) -> None:
    Ks = torch.stack([rbf_gram(paired_features(9, 3, 2, seed=seed)[0]) for seed in range(3)])
    Ls = torch.stack([X @ X.T for X in (paired_features(9, 3, 2, seed=seed)[1] for seed in range(1, 3))])
    oracle = oracles.unbiased_hsic if unbiased else oracles.biased_hsic
    looped = torch.tensor([[hsic(K, L, unbiased=unbiased) for L in Ls] for K in Ks], dtype=torch.float64)
    expected = torch.tensor([[oracle(K.numpy(), L.numpy()) for L in Ls] for K in Ks])
    torch.testing.assert_close(pairwise_hsic(Ks, Ls, unbiased=unbiased), looped, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(looped, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("K", "L", "message"),
    [
        (torch.ones(5, 4), torch.ones(5, 4), r"square matrices of the same size .* got \(5, 4\) and \(5, 4\)"),
        (torch.ones(5, 5), torch.ones(6, 6), r"square matrices of the same size .* got \(5, 5\) and \(6, 6\)"),
        (torch.ones(2, 5, 5), torch.ones(2, 5, 5), r"square matrices .* got \(2, 5, 5\)"),
        (torch.ones(5, 5).int(), torch.ones(5, 5), "Expected `K` and `L` to be floating point, but got torch.int32"),
        (torch.ones(5, 5), torch.ones(5, 5).int(), "floating point, but got torch.float32 and torch.int32"),
    ],
)
def test_wrong_gram_matrices_are_an_error(K: Tensor, L: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hsic(K, L, unbiased=False)
    with pytest.raises(ValueError, match=message):
        cka_from_gram(K, L)
