"""RankMe against NumPy's singular values, from features and from their products."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_cka.functional import rankme, rankme_from_gram
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features


def oracle(x: np.ndarray) -> float:
    """Garrido et al. 2023, eq. 1, with their epsilon, which is below the tolerance."""
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum() + 1e-15
    return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize(("n", "d"), [(40, 6), (12, 30), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (30.0, torch.float32)])
def test_equals_the_oracle(n: int, d: int, offset: float, dtype: torch.dtype) -> None:
    X, _ = paired_features(n, d, 1, offset=offset, dtype=dtype)
    x = float64(X)
    assert rankme(X) == pytest.approx(oracle(x), rel=1e-9)
    assert rankme_from_gram(X.double().T @ X.double()) == pytest.approx(oracle(x), rel=1e-6)
    assert rankme_from_gram(X.double() @ X.double().T) == pytest.approx(oracle(x), rel=1e-6)
    if n > 1:
        assert rankme(X, centre=True) == pytest.approx(oracle(x - x.mean(0)), rel=1e-7)


def test_invariances_and_range() -> None:
    X, _ = paired_features(40, 6, 1)
    for x in (X @ rotation(6), X * 1e-75, X * 1e75, X * 1e-300, X.flip(0)):
        assert rankme(x) == pytest.approx(rankme(X), rel=1e-9)
    assert rankme(X + 1e3, centre=True) == pytest.approx(rankme(X, centre=True), rel=1e-9)
    assert rankme(rotation(6)) == pytest.approx(6)
    assert rankme(torch.outer(X[:, 0], X[0])) == pytest.approx(1)
    assert rankme_from_gram(torch.eye(6) * 1e-30) == pytest.approx(6)
    assert rankme(X) < rankme(X, centre=True)  # a mean far off is one large direction


def test_undefined() -> None:
    X, _ = paired_features(10, 4, 1)
    assert math.isnan(rankme(torch.zeros(5, 3)))
    assert math.isnan(rankme(torch.full((5, 3), 0.1), centre=True))
    for bad in (torch.nan, torch.inf):
        broken = X.where(X.max() > X, bad)
        assert math.isnan(rankme(broken))
        assert math.isnan(rankme(broken, centre=True))
        assert math.isnan(rankme_from_gram(broken.T @ broken))
    assert math.isnan(rankme_from_gram(torch.zeros(3, 3)))


def test_wrong_input_is_an_error() -> None:
    for X in (torch.ones(3), torch.ones(3, 2, dtype=torch.long), torch.ones(0, 3)):
        with pytest.raises(ValueError, match=r"of shape \(samples, features\), with at least one of each"):
            rankme(X)
    for gram in (torch.ones(3, 2), torch.ones(3, 3, dtype=torch.long), torch.ones(0, 0)):
        with pytest.raises(ValueError, match="a square matrix, floating point"):
            rankme_from_gram(gram)
