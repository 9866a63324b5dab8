"""The debiased CKA of m samples without each of them in turn, from which its error is told: the jackknife.

CKA is a ratio of U-statistics, sums over pairs of samples. Its variance has a part of single samples, which falls as
1 / n, and a part of pairs, which falls as 1 / n^2 and is all that there is where features are unrelated (Hoeffding
1948).
Leaving samples out shows the sum of both, and the HSIC of the pairs' contributions with themselves the second alone.
Deleting is exact: it takes one pass over the Gram matrices for all samples at once, not m computations of CKA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.cka import is_hsic_rounding
from lit_cka.functional.kernels import linear_gram
from lit_cka.functional.units import in_usual_unit

MIN_SAMPLES = 8  # below, deleting one is no small change
_POWER_STEPS = 8


class Jackknife(NamedTuple):
    """What m samples tell of the error of one layer's CKA, or of many layers' at once (...).

    Example:
        >>> X = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
        >>> layers = linear_jackknife(X, 2 * X + 1)  # of three layers
        >>> layers.value.shape, layers.without.shape
        (torch.Size([3]), torch.Size([3, 20]))
    """

    value: Tensor  # (...) their own CKA, T
    without: Tensor  # (..., m) it without each of them, T_i
    pairs: Tensor  # (...) the variance of the pairs' contributions Q to it, tau^2 = HSIC(Q, Q)
    concentration: Tensor  # (...) how much of both sides is in one direction: largest eigenvalue / Frobenius norm


@takes_arrays
def jackknife_cka(K: Tensor, L: Tensor) -> Jackknife:
    """Returns the jackknife of the debiased CKA of Gram matrices, any kernel, (..., m, m) each, of the same m samples.

    They have to be float64, and centred: else their digits are lost. NaN where CKA is undefined, also without a sample.

    Raises:
        ValueError: for fewer than `MIN_SAMPLES` samples.

    Example:
        >>> X = torch.linspace(-1, 1, 8, dtype=torch.float64)
        >>> K, L = torch.outer(X, X), torch.outer(X.square() - X.square().mean(), X.square() - X.square().mean())
        >>> [round(value, 3) for value in jackknife_cka(K, L).without.tolist()]
        [-0.022, -0.427, -0.301, -0.302, -0.302, -0.301, -0.427, -0.022]
    """
    return pair_jackknife(SampledGram(K), SampledGram(L))


class SampledGram:
    """Gram matrices (..., m, m) of m samples, and what the jackknife takes of them alone, once for all pairs.

    Args:
        K: any kernel, float64 and centred.

    Raises:
        ValueError: for fewer than `MIN_SAMPLES` samples.
    """

    def __init__(self, K: Tensor) -> None:
        if K.shape[-1] < MIN_SAMPLES:
            raise ValueError(f"Expected at least {MIN_SAMPLES} samples for an interval of CKA, but got {K.shape[-1]}.")
        self.K, self.A = without_diagonal(K), u_centred(K)
        sums = _Sums(self.K, self.K)
        self.hsic, self.hsic_without = sums.all(), sums.without_each()
        size = _inner(self.A, self.A).sqrt()
        self.concentration = _concentration(self.A, size)
        self.A.div_(size[..., None, None])  # of length 1


def pair_jackknife(x: SampledGram, y: SampledGram) -> Jackknife:
    """Returns the `jackknife_cka` of two Gram matrices of the same samples, each of which may be in other pairs too."""
    m, xy = x.K.shape[-1], _Sums(x.K, y.K)
    value = _ratio(xy.all(), x.hsic, y.hsic)
    without = _ratio(xy.without_each(), x.hsic_without, y.hsic_without)
    # Q = A B - T / 2 (A^2 + B^2), element by element
    squares = (x.A * x.A).addcmul_(y.A, y.A)
    Q = (x.A * y.A).sub_(squares.mul_(_inner(x.A, y.A)[..., None, None] / 2))
    # Where pairs say no more than single samples do, it is what rounding leaves of 0, and may be negative.
    pairs = (_Sums(Q, Q).all() * (m * (m - 3)) ** 2).clamp(min=0)
    return Jackknife(value, without, pairs, x.concentration * y.concentration)


@takes_arrays
def linear_jackknife(X: Tensor, Y: Tensor) -> Jackknife:
    """Returns the `jackknife_cka` of linear CKA, of features (..., m, d_x) and (..., m, d_y) in any floating dtype.

    Example:
        >>> X = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        >>> print(f"{linear_jackknife(X, 2 * X + 1).without.min():.6f}")
        1.000000
    """
    return jackknife_cka(unit_gram(X), unit_gram(Y))


def unit_gram(X: Tensor) -> Tensor:
    """Returns linear Gram matrices (..., m, m) of features (..., m, d), in a unit in which squares do not overflow."""
    return linear_gram(in_usual_unit(X))


def without_diagonal(K: Tensor) -> Tensor:
    """Returns matrices (..., m, m) with zeros on their diagonals."""
    K = K.clone()
    K.diagonal(dim1=-2, dim2=-1).zero_()
    return K


def u_centred(K: Tensor) -> Tensor:
    """Returns the U-centring (Szekely & Rizzo 2014, arXiv 1310.2926) of centred matrices (..., m, m): rows that sum to
    0, and zeros on the diagonal. All zeros where nothing but rounding is left, as for equidistant samples.

    Their inner products are m (m - 3) times the unbiased HSIC.
    """
    m, size = K.shape[-1], _inner(K, K) + K.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    K = without_diagonal(K)
    rows = K.sum(-1)
    shift = (rows - rows.sum(-1, keepdim=True) / (2 * (m - 1))) / (m - 2)
    A = (K - shift[..., :, None]).sub_(shift[..., None, :])
    A.diagonal(dim1=-2, dim2=-1).zero_()
    is_rounding = is_hsic_rounding(_inner(A, A), size, m)
    return A.masked_fill(is_rounding[..., None, None], 0.0)


def _inner(A: Tensor, B: Tensor) -> Tensor:
    inner: Tensor = torch.linalg.vecdot(A.flatten(-2), B.flatten(-2))
    return inner


class _Sums:
    """The sums of eq. 5 of Song et al. 2012 for two stacks of matrices (..., m, m) with zero diagonals."""

    def __init__(self, K: Tensor, L: Tensor) -> None:
        self.m = K.shape[-1]
        self.rows_K, self.rows_L = K.sum(-1), L.sum(-1)
        self.products = torch.linalg.vecdot(K, L)  # of each row with its own
        across = K @ self.rows_L[..., None]
        self.across = (2 * across if K is L else across + L @ self.rows_K[..., None])[..., 0]

    def _hsic(self, m: int, trace: Tensor, totals: Tensor, rows: Tensor) -> Tensor:
        hsic = trace + totals / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows
        size = trace.abs() + totals.abs() / (m * m) + rows.abs() / m
        rounding = is_hsic_rounding(hsic.abs(), size, m)
        return hsic.masked_fill(rounding, 0.0) / (m * (m - 3))

    def all(self) -> Tensor:
        """Returns the unbiased HSIC (...)."""
        totals = self.rows_K.sum(-1) * self.rows_L.sum(-1)
        return self._hsic(self.m, self.products.sum(-1), totals, (self.rows_K * self.rows_L).sum(-1))

    def without_each(self) -> Tensor:
        """Returns it without each sample (..., m): a row and a column less in each sum."""
        trace = self.products.sum(-1, keepdim=True) - 2 * self.products
        total_K, total_L = (each.sum(-1, keepdim=True) - 2 * each for each in (self.rows_K, self.rows_L))
        both = self.rows_K * self.rows_L
        rows = both.sum(-1, keepdim=True) - both - self.across + self.products
        return self._hsic(self.m - 1, trace, total_K * total_L, rows)


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    value: Tensor = (xy / (xx.sqrt() * yy.sqrt())).clamp(-1, 1)
    return value.masked_fill(~((xx > 0) & (yy > 0)), torch.nan)


def _concentration(A: Tensor, size: Tensor) -> Tensor:
    """Returns the largest eigenvalue of matrices over their Frobenius norm, at least nearly: by the power method, from
    the longest row, which is the same in any order of the samples.
    """
    longest = torch.linalg.vecdot(A, A).argmax(-1)[..., None, None]
    vector = A.take_along_dim(longest, dim=-2).mT
    for _ in range(_POWER_STEPS):
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp(min=1e-300)
        vector = A @ vector
    largest: Tensor = vector.norm(dim=-2)[..., 0]
    return largest / size
