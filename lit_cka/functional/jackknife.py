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

    Attributes:
        A: (..., m, m) their `u_centred`, of length 1; NaN where nothing but rounding is left.
        squares: (..., m) the sum of the squares of each row of A.
        without: (..., m) the sum of all squares without each sample, as `pair_jackknife` says; 0 where it is rounding.
        concentration: (...) the largest eigenvalue.

    Raises:
        ValueError: for fewer than `MIN_SAMPLES` samples.
    """

    def __init__(self, K: Tensor) -> None:
        if K.shape[-1] < MIN_SAMPLES:
            raise ValueError(f"Expected at least {MIN_SAMPLES} samples for an interval of CKA, but got {K.shape[-1]}.")
        self.A, squares, is_rounding = _u_centred(K)
        length = squares.sum(-1, keepdim=True).masked_fill(is_rounding[..., None], torch.nan).sqrt()
        self.A.div_(length[..., None])
        self.squares = squares / length.square()
        without = _without_each(self.squares)
        self.without = without.masked_fill(is_hsic_rounding(without, length / length, K.shape[-1]), 0.0)
        self.concentration = _largest_eigenvalue(self.A, squares.argmax(-1))


def pair_jackknife(x: SampledGram, y: SampledGram) -> Jackknife:
    """Returns the `jackknife_cka` of two Gram matrices of the same samples, each of which may be in other pairs too.

    HSIC sees of a Gram matrix no more than its U-centring, also of the samples that are left, and rows of A and B sum
    to 0. So where a sample is left out, eq. 5 of Song et al. 2012 is what the products in its row tell:

        T = <A, B>        HSIC_i ~ <A, B> - 2 (m - 2) / (m - 3) sum_j A_ij B_ij        T_i = its ratio, as for T

    and of the pairs' contributions, whose sum is 0,

        Q = A B - T / 2 (A^2 + B^2)        tau^2 = m (m - 3) (|Q|^2 - 2 / (m - 2) sum_i (sum_j Q_ij)^2)
    """
    m = x.A.shape[-1]
    Q = x.A * y.A
    products = Q.sum(-1)
    value = products.sum(-1)
    norms = (x.without * y.without).sqrt()
    without = (_without_each(products) / norms).clamp(-1, 1).masked_fill(norms == 0, torch.nan)
    Q.addcmul_((x.A * x.A).addcmul_(y.A, y.A), value[..., None, None], value=-0.5)
    rows = products - value[..., None] / 2 * (x.squares + y.squares)
    square = _inner(Q, Q)
    rest = square - 2 / (m - 2) * rows.square().sum(-1)
    # Where pairs say no more than single samples do, it is what rounding leaves of 0, and may be negative.
    pairs = rest.masked_fill(is_hsic_rounding(rest, square, m), 0.0) * (m * (m - 3))
    return Jackknife(value.clamp(-1, 1), without, pairs, x.concentration * y.concentration)


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


def u_centred(K: Tensor) -> Tensor:
    """Returns the U-centring (Szekely & Rizzo 2014, arXiv 1310.2926) of centred matrices (..., m, m): rows that sum to
    0, and zeros on the diagonal. All zeros where nothing but rounding is left, as for equidistant samples.

    Their inner products are m (m - 3) times the unbiased HSIC.
    """
    A, _, is_rounding = _u_centred(K)
    return A.mul_(~is_rounding[..., None, None])


def _u_centred(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same, but with what rounding leaves, the sums (..., m) of the squares of each row, and whether
    rounding (...) is all that is left.
    """
    m, diagonal = K.shape[-1], K.diagonal(dim1=-2, dim2=-1)
    rows = K.sum(-1) - diagonal
    shift = (rows - rows.sum(-1, keepdim=True) / (2 * (m - 1))) / (m - 2)
    A = (K - shift[..., :, None]).sub_(shift[..., None, :])
    A.diagonal(dim1=-2, dim2=-1).zero_()
    squares, size = torch.linalg.vecdot(A, A), _inner(K, K) + diagonal.square().sum(-1)
    return A, squares, is_hsic_rounding(squares.sum(-1), size, m)


def _inner(A: Tensor, B: Tensor) -> Tensor:
    inner: Tensor = torch.linalg.vecdot(A.flatten(-2), B.flatten(-2))
    return inner


def _without_each(rows: Tensor) -> Tensor:
    """Returns what the HSIC without each sample (..., m) is in proportion to, from the sums of the rows of `A B`."""
    m = rows.shape[-1]
    return rows.sum(-1, keepdim=True) - 2 * (m - 2) / (m - 3) * rows


def _largest_eigenvalue(A: Tensor, longest: Tensor) -> Tensor:
    """Returns the largest eigenvalues (...) of matrices of length 1, at least nearly: by the power method, from the
    longest row, which is the same in any order of the samples.
    """
    vector = A.take_along_dim(longest[..., None, None], dim=-2).mT
    for _ in range(_POWER_STEPS):
        before, vector = vector, A @ vector
    largest: Tensor = vector.norm(dim=(-2, -1)) / before.norm(dim=(-2, -1))
    return largest
