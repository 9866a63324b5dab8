"""RSA against SciPy on the condensed matrices, ties, and matrices that have no correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist

from lit_cka.analysis.rsa import Correlation, compare_rdms, pairwise_rsa, rsa
from lit_cka.functional.rsa import Distance, rdm
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features

ORACLES = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}
COMPARISONS = pytest.mark.parametrize("comparison", list(ORACLES))


@COMPARISONS
@pytest.mark.parametrize("distance", ["cosine", "correlation", "euclidean"])
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(12, 5, 3), (7, 30, 20), (3, 4, 4)])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (1e4, torch.float32)])
def test_rsa_equals_scipy(
    n: int, d_x: int, d_y: int, offset: float, dtype: torch.dtype, distance: Distance, comparison: Correlation
) -> None:
    X, Y = paired_features(n, d_x, d_y, offset=offset, dtype=dtype)
    if distance != "euclidean" and offset == 1e4:
        X, Y = X - X.mean(0), Y - Y.mean(0)  # the angles of far-off features are rounding
    expected = ORACLES[comparison](pdist(float64(X), distance), pdist(float64(Y), distance)).statistic
    value = rsa(X, Y, distance, comparison)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, abs=1e-9)


@COMPARISONS
def test_ties_are_as_in_scipy(comparison: Correlation) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, size=(2, 28)) / 3
    R, S = torch.zeros(2, 8, 8, dtype=torch.float64)
    rows, columns = torch.triu_indices(8, 8, offset=1)
    for matrix, values in ((R, x), (S, y)):
        matrix[rows, columns] = matrix[columns, rows] = torch.from_numpy(values)
    expected = ORACLES[comparison](x, y).statistic
    assert compare_rdms(R, S, comparison).item() == pytest.approx(expected, abs=1e-12)
    noise = 1e-15 * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert compare_rdms(R + noise, S - noise, comparison).item() == pytest.approx(expected, abs=1e-12)


@COMPARISONS
def test_pairwise_is_every_pair(comparison: Correlation) -> None:
    Rs = torch.stack([rdm(paired_features(8, 4, 4, seed=seed)[0]) for seed in range(3)])
    Ss = torch.stack([rdm(paired_features(8, 4, 4, seed=seed)[1]) for seed in range(2)])
    Rs[1, 2] = torch.nan
    values = pairwise_rsa(Rs, Ss, comparison)
    looped = torch.stack([torch.stack([compare_rdms(R, S, comparison) for S in Ss]) for R in Rs])
    torch.testing.assert_close(values, looped, equal_nan=True)
    assert values.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@COMPARISONS
def test_invariances(comparison: Correlation) -> None:
    X, Y = paired_features(10, 5, 4)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    value = rsa(X, Y, "euclidean", comparison)
    for x, y in [(7 * X @ rotation(5) + 3, Y), (X[order], Y[order]), (Y, X)]:
        torch.testing.assert_close(rsa(x, y, "euclidean", comparison), value, rtol=0, atol=1e-12)
    assert (rsa(X[order], Y, "euclidean", comparison) - value).abs() > 1e-3
    assert rsa(X, -2 * X, "euclidean", comparison).item() == pytest.approx(1)


def test_the_defaults_are_spearman_of_correlation_distances() -> None:
    X, Y = paired_features(10, 5, 4)
    expected = stats.spearmanr(pdist(X, "correlation"), pdist(Y, "correlation")).statistic
    assert rsa(X, Y).item() == pytest.approx(expected, abs=1e-12)


@COMPARISONS
def test_nan_where_there_is_no_correlation(comparison: Correlation) -> None:
    X, _ = paired_features(6, 6, 4)
    zero = X.clone()
    zero[2] = 0
    assert rsa(X, zero, "cosine", comparison).isnan()
    assert rsa(X, torch.full_like(X, 0.1), "euclidean", comparison).isnan()
    equidistant = torch.eye(6, dtype=torch.float64) @ rotation(6)
    assert rsa(X, equidistant, "euclidean", comparison).isnan()
    assert rsa(equidistant, X, "cosine", comparison).isnan()


def test_wrong_input_is_an_error() -> None:
    R = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"`comparison` to be one of .* but got 'cosine'"):
        compare_rdms(R, R, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"square and of the same size .* got \(4, 4\) and \(3, 3\)"):
        compare_rdms(R, R[:3, :3])
    with pytest.raises(ValueError, match="at least 3 samples, but got 2"):
        rsa(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="the same samples in the same order, but got 4 and 5"):
        rsa(torch.ones(4, 3), torch.ones(5, 3))
