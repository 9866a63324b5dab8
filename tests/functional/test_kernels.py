"""Gram matrices against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from lit_cka.functional import cka_from_gram, linear_gram, rbf_gram
from tests import oracles
from tests.oracles import float64, paired_features


@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float64), (3.0, torch.float16), (1e4, torch.float32)])
def test_linear_gram_holds_the_centred_products(offset: float, dtype: torch.dtype) -> None:
    X, _ = paired_features(9, 5, 5, offset=offset, dtype=dtype)
    K = linear_gram(X)
    assert K.dtype == torch.float64
    np.testing.assert_allclose(K, oracles.linear_gram(float64(X)), atol=1e-9)
    np.testing.assert_allclose(K.sum(0), 0, atol=1e-9)


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float64), (3.0, torch.bfloat16), (1e4, torch.float32)])
@pytest.mark.parametrize("n", [3, 6, 7], ids=["3 pairs", "15 pairs", "21 pairs"])
def test_rbf_gram_equals_scipy(n: int, offset: float, dtype: torch.dtype, bandwidth: float) -> None:
    X, _ = paired_features(n, 5, 5, offset=offset, dtype=dtype)
    K = rbf_gram(X, bandwidth=bandwidth)
    assert K.dtype == torch.float64
    np.testing.assert_allclose(K, oracles.rbf_gram(float64(X), bandwidth), atol=1e-9)


@pytest.mark.parametrize("n", [4, 8], ids=["6 pairs", "28 pairs"])
def test_the_median_of_an_even_number_of_distances_is_the_mean_of_the_middle_two(n: int) -> None:
    """As for NumPy, SciPy and scikit-learn, so that values can be compared; `torch.median` takes the lower one."""
    X, _ = paired_features(n, 5, 5)
    np.testing.assert_allclose(rbf_gram(X), oracles.rbf_gram(float64(X)), atol=1e-9)


def test_the_bandwidth_is_in_median_distances_between_different_samples() -> None:
    X, _ = paired_features(7, 5, 5)
    K = rbf_gram(X, bandwidth=0.7)
    median = np.median(pdist(X.numpy()))
    distance = (X[2] - X[4]).norm().item()
    assert K[2, 4].item() == pytest.approx(np.exp(-(distance**2) / (2 * (0.7 * median) ** 2)), rel=1e-12)
    np.testing.assert_array_equal(K.diagonal(), 1)


def test_rbf_gram_ignores_scale_and_place() -> None:
    X, _ = paired_features(7, 5, 5)
    torch.testing.assert_close(rbf_gram(X * 1e-5 + 3), rbf_gram(X), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_leading_dimensions_are_a_batch(gram: type) -> None:
    X = torch.stack([paired_features(7, 3, 3, seed=seed)[0] for seed in range(6)]).reshape(2, 3, 7, 3)
    looped = torch.stack([gram(x) for x in X.flatten(0, 1)]).reshape(2, 3, 7, 7)
    torch.testing.assert_close(gram(X), looped)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_identical_samples_have_constant_gram_matrices(value: float) -> None:
    X = torch.full((33, 4), value, dtype=torch.float64)
    assert torch.equal(linear_gram(X), torch.zeros(33, 33, dtype=torch.float64))
    assert torch.equal(rbf_gram(X), torch.ones(33, 33, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(10))
def test_samples_that_occur_several_times_have_no_negative_distance(seed: int) -> None:
    """Their squared distance, a difference of products, may come out just below 0, and its root as NaN."""
    X = paired_features(3, 5, 5, seed=seed)[0].repeat(3, 1)
    np.testing.assert_allclose(rbf_gram(X), oracles.rbf_gram(float64(X)), atol=1e-9)


def test_mostly_identical_samples_keep_their_distances() -> None:
    """With a median of 0 the bandwidth cannot be a multiple of it, but the one sample apart has to stay apart."""
    X = torch.full((8, 4), 0.1, dtype=torch.float64)
    X[5] = 2
    K = rbf_gram(X)
    assert torch.equal(K[:5, :5], torch.ones(5, 5, dtype=torch.float64))
    assert K[5, 0] < 0.1
    assert cka_from_gram(K, K).item() == pytest.approx(1)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_distances(n: int) -> None:
    assert torch.equal(rbf_gram(torch.randn(n, 3)), torch.ones(n, n, dtype=torch.float64))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0])
def test_a_bandwidth_is_positive(bandwidth: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `bandwidth` to be positive, but got {bandwidth}"):
        rbf_gram(torch.randn(5, 3), bandwidth=bandwidth)
