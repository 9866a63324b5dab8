"""SVCCA and PWCCA against canonical correlations by SciPy's generalised eigenvalues, their invariances and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from sklearn.cross_decomposition import CCA
from torch import Tensor

from lit_cka.functional import pwcca, svcca
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features

MEASURES = pytest.mark.parametrize("measure", [svcca, pwcca])
SHAPES = pytest.mark.parametrize(("n", "d_x", "d_y"), [(60, 6, 3), (60, 3, 6), (40, 15, 12), (25, 8, 8)])


def canonical(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations, descending, and variates of `x` (n, m), of unit norm: the eigenvalues of Hotelling 1936."""
    cross = x.T @ y
    squared, A = eigh(cross @ np.linalg.solve(y.T @ y, cross.T), x.T @ x)
    order = np.argsort(squared)[::-1][: min(x.shape[1], y.shape[1])]
    variates = x @ A[:, order]
    return np.sqrt(np.clip(squared[order], 0, 1)), variates / np.linalg.norm(variates, axis=0)


def truncated(x: np.ndarray, variance: float) -> np.ndarray:
    """By the covariance matrix, its eigenvectors."""
    values, vectors = np.linalg.eigh(np.cov(x.T))
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = np.searchsorted(np.cumsum(values) / np.sum(values), variance) + 1
    return x @ vectors[:, :kept]


def svcca_oracle(X: Tensor, Y: Tensor, variance: float) -> float:
    x, y = (truncated(float64(Z) - float64(Z).mean(0), variance) for Z in (X, Y))
    return float(np.mean(canonical(x, y)[0]))


def pwcca_oracle(X: Tensor, Y: Tensor) -> float:
    x, y = (float64(Z) - float64(Z).mean(0) for Z in (X, Y))
    rho, variates = canonical(x, y)
    weights = np.abs(variates.T @ x).sum(axis=1)
    return float(weights @ rho / weights.sum())


@SHAPES
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (1e4, torch.float32)])
def test_equals_the_oracle(n: int, d_x: int, d_y: int, related: bool, offset: float, dtype: torch.dtype) -> None:
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, dtype=dtype)
    for variance in (0.5, 0.9, 0.99):
        value = svcca(X, Y, variance=variance)
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(svcca_oracle(X, Y, variance), abs=1e-8)
    value = pwcca(X, Y)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(pwcca_oracle(X, Y), abs=1e-7)


def test_the_correlations_are_those_of_scikit_learn() -> None:
    X, Y = paired_features(60, 4, 3)
    with torch.no_grad():
        a, b = CCA(n_components=3, tol=1e-12, max_iter=10_000).fit_transform(X.numpy(), Y.numpy())
    rho = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
    assert svcca(X, Y, variance=1.0).item() == pytest.approx(np.mean(rho), abs=1e-6)


@MEASURES
def test_invariances(measure: Any) -> None:
    X, Y = paired_features(50, 6, 4)
    expected = measure(X, Y)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    cases = [(X + 100, Y), (X * 1e-75, Y * 1e75), (X[order], Y[order])]
    # A rotation mixes the features that PWCCA weights by.
    cases += [(X @ rotation(6), Y)] if measure is svcca else [(X, Y @ rotation(4) * 3), (X.flip(1), Y)]
    for x, y in cases:
        torch.testing.assert_close(measure(x, y), expected, rtol=0, atol=1e-9)
    mixed = X @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    value = svcca(X, mixed, variance=1.0) if measure is svcca else pwcca(X, mixed)
    assert value.item() == pytest.approx(1, abs=1e-9)
    assert 0 < expected < 1


def test_the_first_argument_weights() -> None:
    X, Y = paired_features(50, 6, 4)
    assert abs(pwcca(X, Y) - pwcca(Y, X)) > 1e-3
    torch.testing.assert_close(svcca(X, Y), svcca(Y, X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variance", [0.5, 0.99, 1.0])
def test_directions_of_rounding_are_none(variance: float) -> None:
    """Features of rank 2 in six columns, beside unrelated ones."""
    X, Y = paired_features(40, 2, 5, related=False)
    wide = X @ torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    if variance == 1.0:
        assert svcca(wide, Y, variance=variance).item() == pytest.approx(
            svcca(X, Y, variance=variance).item(), abs=1e-9
        )
    assert svcca(wide, Y, variance=variance) < 0.9
    assert pwcca(wide, wide + 1).item() == pytest.approx(1)


@MEASURES
def test_too_few_samples_say_nothing(measure: Any) -> None:
    """All directions of the samples are there on both sides: the correlations are 1 for any features."""
    X, Y = paired_features(10, 20, 30, related=False)
    value = measure(X, Y, variance=1.0) if measure is svcca else measure(X, Y)
    assert value.item() == pytest.approx(1, abs=1e-9)


@MEASURES
def test_undefined(measure: Any) -> None:
    X, Y = paired_features(20, 4, 5)
    for bad in (torch.ones_like(X) * 0.1, X.where(X.max() > X, torch.nan), X.where(X.max() > X, torch.inf)):
        assert measure(bad, Y).isnan()
        assert measure(Y, bad).isnan()


@MEASURES
def test_wrong_input_is_an_error(measure: Any) -> None:
    X, Y = paired_features(10, 4, 5)
    with pytest.raises(ValueError, match="at least 2 samples, but got 1"):
        measure(X[:1], Y[:1])
    with pytest.raises(ValueError, match="same samples"):
        measure(X[:9], Y)
    with pytest.raises(ValueError, match="floating point"):
        measure(X.long(), Y)
    for variance in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"`variance`.* in \(0, 1\], but got {variance}"):
            svcca(X, Y, variance=variance)
