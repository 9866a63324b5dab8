"""Representational similarity analysis (RSA): the correlation of two dissimilarity matrices.

Kriegeskorte et al. 2008, "Representational similarity analysis" (Frontiers in Systems Neuroscience 2); ranks and
Kendall's tau by SciPy.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.moments import check_features
from lit_cka.functional.rsa import Distance, rdm

Correlation = Literal["spearman", "pearson", "kendall"]

# Distances that differ by less than this share of the largest are ties: they are equal but for rounding.
_TIE = 1e-12


@takes_arrays
def rsa(X: Tensor, Y: Tensor, distance: Distance = "correlation", comparison: Correlation = "spearman") -> Tensor:
    """Returns the RSA of two sets of features: the correlation of their RDMs over all pairs of samples.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.
        distance: of the RDMs, see `rdm`: `cosine`, `correlation` or `euclidean`.
        comparison: of the RDMs, see `compare_rdms`: `spearman`, `pearson` or `kendall`.

    Returns:
        Float64 scalar in [-1, 1]; NaN as `compare_rdms`.

    Raises:
        ValueError: on an unknown choice, integer features, wrong shapes, unequal `n`, or fewer than 3 samples.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 5.0]])
        >>> print(f"{rsa(X, 5 * X + 7, 'euclidean'):.6f}")
        1.000000
    """
    check_features(X, Y)
    return compare_rdms(rdm(X, distance), rdm(Y, distance), comparison)


@takes_arrays
def compare_rdms(R: Tensor, S: Tensor, comparison: Correlation = "spearman") -> Tensor:
    """Returns the correlation of two RDMs (n, n) over the n (n - 1) / 2 pairs of samples: a float64 scalar in [-1, 1].

        spearman  Pearson's correlation of the ranks, ties at their average rank
        pearson   of the distances
        kendall   tau-b, which corrects for ties, in O(n^2 log n)

    Distances equal up to rounding are ties. NaN where an RDM holds NaN or infinity, or the same distance throughout.

    Raises:
        ValueError: on an unknown comparison, matrices that are not square and of equal size, or fewer than 3 samples.
    """
    return pairwise_rsa(R[None], S[None], comparison)[0, 0]


@takes_arrays
def pairwise_rsa(Rs: Tensor, Ss: Tensor, comparison: Correlation = "spearman") -> Tensor:
    """Returns `compare_rdms` of every RDM in `Rs` (a, n, n) with every one in `Ss` (b, n, n): (a, b)."""
    if comparison not in get_args(Correlation):
        raise ValueError(f"Expected `comparison` to be one of {get_args(Correlation)}, but got {comparison!r}.")
    if Rs.ndim != 3 or Ss.ndim != 3 or not Rs.shape[1] == Rs.shape[2] == Ss.shape[1] == Ss.shape[2]:
        raise ValueError(
            "Expected the dissimilarity matrices to be square and of the same size (samples, samples), "
            f"but got {tuple(Rs.shape[1:])} and {tuple(Ss.shape[1:])}."
        )
    if Rs.shape[1] < 3:
        raise ValueError(f"Expected at least 3 samples, but got {Rs.shape[1]}.")
    r, s = _pairs(Rs), _pairs(Ss)
    if comparison == "kendall":
        # The p-value, which nobody reads, is what the exact method would spend its time on.
        values = np.array([[_tau(x, y) for y in s] for x in r])
    else:
        values = _standardized(r, comparison) @ _standardized(s, comparison).T
    return torch.from_numpy(np.clip(values, -1, 1))


def standardized_rdms(rdms: Tensor, comparison: Literal["spearman", "pearson"]) -> Tensor:
    """Returns symmetric matrices (a, n, n) of the RDMs, 0 on the diagonal, whose cosines are their correlations.

    Of samples that are permuted, the ranks of the distances are too, and need not be found again.
    """
    n = rdms.shape[-1]
    rows, columns = torch.triu_indices(n, n, offset=1)
    matrices = torch.zeros(len(rdms), n, n, dtype=torch.float64)
    matrices[:, rows, columns] = torch.from_numpy(_standardized(_pairs(rdms), comparison))
    return matrices + matrices.mT


def _pairs(rdms: Tensor) -> np.ndarray:
    """Returns each RDM's upper triangle in units of its tie distance; NaN for an RDM of one distance throughout."""
    n = rdms.shape[-1]
    rows, columns = torch.triu_indices(n, n, offset=1, device=rdms.device)
    pairs = rdms.detach().to(torch.float64)[:, rows, columns].cpu().numpy()
    pairs[~np.isfinite(pairs).all(axis=1)] = np.nan
    size = np.abs(pairs).max(axis=1, keepdims=True)
    pairs = np.round(pairs / np.where(size == 0, 1, size) / _TIE)
    pairs[np.ptp(pairs, axis=1) <= 1] = np.nan
    return pairs


def _standardized(pairs: np.ndarray, comparison: Correlation) -> np.ndarray:
    from scipy.stats import rankdata

    values = rankdata(pairs, axis=1) if comparison == "spearman" else pairs
    values = values - values.mean(axis=1, keepdims=True)
    standardized: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return standardized


def _tau(x: np.ndarray, y: np.ndarray) -> float:
    if np.isnan(x).any() or np.isnan(y).any():
        return np.nan
    from scipy.stats import kendalltau

    return float(kendalltau(x, y, method="asymptotic").statistic)
