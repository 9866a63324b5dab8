"""CKA for sampled features against sums over pairs of features and quadruples of samples, and its bias."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import linear_cka, sampled_features_cka
from tests import oracles
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features


def mixed_features(n: int, d_x: int, d_y: int, dtype: torch.dtype = torch.float64, offset: float = 3.0) -> list[Tensor]:
    """Features of a few factors that both sides have, and one that each has alone: off centre, with noise."""
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((n, 5)) * [2, 1, 1, 2, 2]
    sides = [
        factors[:, [0, 1, 2, 3]] @ rng.standard_normal((4, d_x)),
        factors[:, [0, 1, 2, 4]] @ rng.standard_normal((4, d_y)),
    ]
    noisy = [side + rng.standard_normal(side.shape) + offset * rng.standard_normal(side.shape[1]) for side in sides]
    return [torch.from_numpy(side).to(dtype) for side in noisy]


def between(x: np.ndarray, y: np.ndarray) -> float:
    return oracles.unbiased_hsic(np.outer(x, x), np.outer(y, y))


def oracle(X: Tensor, Y: Tensor) -> float:
    """The means of the unbiased HSIC over pairs of features, different ones where both are of one side."""
    x, y = (float64(Z).T - float64(Z).T.mean(axis=1, keepdims=True) for Z in (X, Y))
    cross = np.mean([between(a, b) for a in x for b in y])
    selves = [np.mean([between(a, b) for a, b in permutations(side, 2)]) for side in (x, y)]
    return float(cross / np.sqrt(selves[0] * selves[1]))


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(30, 5, 4), (12, 20, 15), (20, 2, 9)])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (1e4, torch.float32)])
def test_equals_the_oracle(n: int, d_x: int, d_y: int, offset: float, dtype: torch.dtype) -> None:
    X, Y = mixed_features(n, d_x, d_y, dtype, offset)
    value = sampled_features_cka(X, Y)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(oracle(X, Y), abs=1e-8)


def test_unbiased_hsic_is_a_mean_over_quadruples() -> None:
    """What `between` says, by the definition of the U-statistic (Song et al. 2012, section 2)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 6)) + 3
    K, L = np.outer(x, x), np.outer(y, y)
    i, j, q, r = np.array(list(permutations(range(6), 4))).T
    assert between(x, y) == pytest.approx(np.mean(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])), rel=1e-9)


def test_few_features_say_what_all_of_them_would() -> None:
    """Populations of 400 features each: samples of 20 look less similar, and are not."""
    rng = np.random.default_rng(0)
    n, shared = 300, rng.standard_normal((300, 12)) * np.linspace(1, 0.2, 12)
    parts = shared[:, :8], shared[:, 4:]
    X, Y = (torch.from_numpy(part @ rng.standard_normal((8, 400)) + rng.standard_normal((n, 400))) for part in parts)
    whole = sampled_features_cka(X, Y).item()
    drawn = [(X[:, rng.permutation(400)[:20]], Y[:, rng.permutation(400)[:20]]) for _ in range(60)]
    corrected = np.mean([sampled_features_cka(*pair).item() for pair in drawn])
    debiased = np.mean([linear_cka(*pair, debiased=True).item() for pair in drawn])
    assert corrected == pytest.approx(whole, abs=0.02)
    assert 0.2 < debiased < whole - 0.1
    assert whole < 0.8


def test_invariances() -> None:
    X, Y = mixed_features(40, 8, 6)
    expected = sampled_features_cka(X, Y)
    for x, y in ((Y, X), (X + 5, Y), (X * 1e-75, Y * 1e75), (X.flip(1), Y), (X.flip(0), Y.flip(0))):
        torch.testing.assert_close(sampled_features_cka(x, y), expected, rtol=0, atol=1e-9)
    assert abs(sampled_features_cka(X @ rotation(8), Y) - expected) > 1e-3  # which features were drawn counts
    assert sampled_features_cka(X, X.clone()) == pytest.approx(1)


def test_undefined_and_errors() -> None:
    X, Y = paired_features(20, 4, 5)
    for bad in (torch.ones_like(X) * 0.1, X[:, :1], X.where(X.max() > X, torch.nan)):
        assert sampled_features_cka(bad, Y).isnan()
        assert sampled_features_cka(Y, bad).isnan()
    unrelated = torch.eye(20, dtype=torch.float64)  # each feature has nothing to do with the others
    assert sampled_features_cka(unrelated, Y).isnan()
    with pytest.raises(ValueError, match="at least 4 samples"):
        sampled_features_cka(X[:3], Y[:3])
    with pytest.raises(ValueError, match="floating point"):
        sampled_features_cka(X.long(), Y)
