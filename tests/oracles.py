"""Textbook forms in NumPy, float64, with the n x n matrices written out, and features to try them on.

Nothing here is shared with `lit_cka`: HSIC by the centring matrix H = I - 11'/n (Gretton et al. 2005), its unbiased
estimator by zeroed diagonals and vectors of ones (Song et al. 2012, eq. 5), CKA as their ratio (Kornblith et al. 2019).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor


def float64(features: Tensor) -> np.ndarray:
    """The same values, in NumPy and float64."""
    return features.detach().to(torch.float64).numpy()


def linear_gram(features: np.ndarray) -> np.ndarray:
    # Both estimators ignore where the features are measured from. Centred, since products of far-off features would
    # leave the oracle itself without digits.
    centred = features - features.mean(axis=0)
    return centred @ centred.T


def rbf_gram(features: np.ndarray, bandwidth: float = 1.0) -> np.ndarray:
    distances = cdist(features, features)
    median = np.median(distances[np.triu_indices(len(features), k=1)])
    return np.exp(-(distances**2) / (2 * (bandwidth * median) ** 2))


def biased_hsic(K: np.ndarray, L: np.ndarray) -> float:
    # H K H written out; the trace of a product of two matrices is the sum of their elements' products.
    centred = K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()
    return np.sum(centred * L.T) / (len(K) - 1) ** 2


def unbiased_hsic(K: np.ndarray, L: np.ndarray) -> float:
    n = len(K)
    K, L, one = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), np.ones(n)
    trace = np.sum(K * L.T)
    sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (trace + sums - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def cka(K: np.ndarray, L: np.ndarray, debiased: bool) -> float:
    hsic = unbiased_hsic if debiased else biased_hsic
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def linear_cka(X: Tensor, Y: Tensor, debiased: bool) -> float:
    return cka(linear_gram(float64(X)), linear_gram(float64(Y)), debiased)


def paired_features(
    n: int,
    d_x: int,
    d_y: int,
    *,
    related: bool = True,
    offset: float = 3.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features whose columns have spreads around 1, a few large, and means `offset` times as far from 0."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d_x)) * rng.gamma(1.0, size=d_x)
    Y = rng.standard_normal((n, d_y))
    if related:
        Y += 2 * X @ rng.standard_normal((d_x, d_y)) / np.sqrt(d_x)
    X += offset * rng.standard_normal(d_x)
    Y += offset * rng.standard_normal(d_y)
    return torch.from_numpy(X).to(dtype), torch.from_numpy(Y).to(dtype)


def update_svd(W0: Tensor, W1: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The full SVD of `W1 - W0` as a matrix (out, rest)."""
    delta = float64(W1) - float64(W0)
    return np.linalg.svd(delta.reshape(len(delta), -1), full_matrices=False)


def monosoup_rank(s: np.ndarray, rule: str, R: float) -> int:
    if rule in ("energy", "variance"):
        shares = np.cumsum(s**2) / np.sum(s**2)
        return int(np.argmax(shares >= R - 1e-12)) + 1
    p = s[s > 0] / s.sum()
    effective_rank = np.exp(-np.sum(p * np.log(p)))
    return int(np.ceil(np.round(effective_rank, 8)))  # a whole number may have come out some digits off


def monosoup_coefficients(s: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """P_k, rho, lambda_high and lambda_low (Abdollahpoorrostam et al. 2026)."""
    P = np.sum(s[:k] ** 2) / np.sum(s**2)
    rest = np.sum(s[k:] ** 2) / np.sum(s**2)  # 1 - P, with all its digits
    rho = (s[k] / s[0]) ** 2 if k < len(s) else 0.0
    low = rho + (1 - rho) * np.sqrt(rest)
    return P, rho, 1 - low, low


def monosoup_weights(
    W0: Tensor, svd: tuple[np.ndarray, np.ndarray, np.ndarray], k: int, lambda_high: float, lambda_low: float
) -> dict[str, np.ndarray]:
    """The three edited weights, from the SVD of the update."""
    U, s, Vh = svd
    start = float64(W0)
    high = ((U[:, :k] * s[:k]) @ Vh[:k]).reshape(start.shape)
    low = ((U[:, k:] * s[k:]) @ Vh[k:]).reshape(start.shape)
    return {
        "monosoup": start + lambda_high * high + lambda_low * low,
        "highonly": start + high,
        "lowonly": start + low,
    }
