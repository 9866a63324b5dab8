"""Centred kernel alignment (CKA) and the Hilbert-Schmidt independence criterion (HSIC).

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414): linear CKA, eq. 4.
Song et al. 2012, "Feature Selection via Dependence Maximization" (JMLR 13), eq. 5: the unbiased HSIC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import double_centred
from lit_cka.functional.moments import PairedMoments, check_features, paired_moments
from lit_cka.functional.rows import Rows
from lit_cka.functional.sample_space import cheaper_in_sample_space, sample_space_terms
from lit_cka.functional.terms import CKATerms, terms_from_moments
from lit_cka.functional.units import in_usual_unit, unit_exponents


@takes_arrays
def linear_cka(X: Tensor, Y: Tensor, *, debiased: bool = False) -> Tensor:
    """Returns the linear CKA of two sets of features of the same samples.

        CKA = ||Xc' Yc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F)          Xc, Yc centred by column

    1 means equal up to rotation and isotropic scaling, 0 unrelated. The plain estimator is biased upward when `n` is
    small against the widths; `debiased=True` replaces each of the three terms by the unbiased HSIC.

    Computed in float64, through the samples' Gram matrices where `n` is below about three times the widths (cost
    `n^2 d`, see `cheaper_in_sample_space`) and through the feature moments elsewhere (cost `n d^2`): the two are equal.

    Args:
        X: features (n, d_x), any floating dtype.
        Y: features (n, d_y), same samples in the same order.
        debiased: use the unbiased HSIC (Song et al. 2012), which needs 4 samples.

    Returns:
        Float64 scalar in [0, 1] (plain) or [-1, 1] (debiased); NaN where the features of `X` or `Y` are the same for
        all samples, since CKA is 0 / 0 there, and where they hold NaN or infinity.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, or fewer than 2 samples (4 if debiased).

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
        >>> print(f"{linear_cka(X, 5 * X.flip(1) + 7):.6f}")
        1.000000
    """
    check_features(X, Y)
    check_num_samples(len(X), debiased)
    if cheaper_in_sample_space(len(X), X.shape[1], Y.shape[1]):
        terms = sample_space_terms(Rows([X.detach()]), Rows([Y.detach()]), products="float64")
        return cka_from_terms(terms, debiased=debiased)
    return cka_from_moments(paired_moments(in_usual_unit(X), in_usual_unit(Y)), debiased=debiased)


def cka_from_moments(moments: PairedMoments, *, debiased: bool = False) -> Tensor:
    """Returns the linear CKA of the samples that `moments` describe: the value of `linear_cka` on all of them at once.

    Returns a float64 scalar; NaN for constant or non-finite features and for fewer than 2 samples (4 if debiased).

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import linear_cka, paired_moments
        >>> torch.allclose(cka_from_moments(paired_moments(X, Y), debiased=True), linear_cka(X, Y, debiased=True))
        True
    """
    return cka_from_terms(terms_from_moments(moments), debiased=debiased)


def cka_from_terms(terms: CKATerms, *, debiased: bool = False, rounding: float = 0.0) -> Tensor:
    """Returns linear CKA from its terms, as `cka_from_moments` does.

    Args:
        terms: of all samples.
        debiased: use the unbiased HSIC.
        rounding: of the products, relative: 1e-7 where they were in float32. What it leaves of an HSIC of 0 is 0.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import Rows, linear_cka, sample_space_terms
        >>> torch.allclose(cka_from_terms(sample_space_terms(Rows([X]), Rows([Y]))), linear_cka(X, Y))
        True
    """
    n, xy, xx, yy, a, b, aa, bb, ab, varies_x, varies_y = terms
    hsic_xy, hsic_xx, hsic_yy = (
        hsic_from_sums(cross, squares, left, right, n, debiased, rounding)
        for cross, squares, left, right in ((xy, ab, a, b), (xx, aa, a, a), (yy, bb, b, b))
    )
    undefined = (varies_x == 0) | (varies_y == 0) | (n < min_num_samples(debiased))
    return cka_from_hsic(hsic_xy, hsic_xx, hsic_yy).masked_fill(undefined, torch.nan)


@takes_arrays
def cka_from_gram(K: Tensor, L: Tensor, *, debiased: bool = False) -> Tensor:
    """Returns the CKA of two Gram (kernel) matrices (n, n) of the same samples, any kernel; they need not be centred.

    Returns a float64 scalar, NaN where a matrix is constant after centring. Raises as `hsic`.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> round(cka_from_gram(X @ X.T, 5 * X @ X.T).item(), 6)
        1.0
    """
    _check_gram_matrices(K, L)
    K, L = _about_one(K), _about_one(L)
    return cka_from_hsic(hsic(K, L, unbiased=debiased), hsic(K, K, unbiased=debiased), hsic(L, L, unbiased=debiased))


def _about_one(K: Tensor) -> Tensor:
    """Returns a multiple of a Gram matrix, in float64, whose squares neither overflow nor vanish."""
    K = K.detach().to(torch.float64)
    return K * torch.exp2(-unit_exponents(K.abs().amax())) if K.numel() else K


@takes_arrays
def hsic(K: Tensor, L: Tensor, *, unbiased: bool) -> Tensor:
    """Returns the Hilbert-Schmidt independence criterion of two Gram matrices (n, n), in float64.

        biased    tr(K H L H) / (n - 1)^2                                                H = I - 11'/n
        unbiased  [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~ L~ 1 / (n-2)] / (n (n-3))

    where `K~`, `L~` have their diagonal set to zero (Song et al. 2012, eq. 5).

    Raises:
        ValueError: unless both matrices are floating point, square, of equal size, and n >= 2 (biased) or 4 (unbiased).

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> bool(hsic(X @ X.T, X @ X.T, unbiased=True) > hsic(X @ X.T, Y @ Y.T, unbiased=True))
        True
    """
    _check_gram_matrices(K, L)
    return pairwise_hsic(K[None], L[None], unbiased=unbiased)[0, 0]


def _check_gram_matrices(K: Tensor, L: Tensor) -> None:
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape != L.shape:
        raise ValueError(
            "Expected `K` and `L` to be square matrices of the same size (samples, samples), "
            f"but got {tuple(K.shape)} and {tuple(L.shape)}."
        )
    if not (K.is_floating_point() and L.is_floating_point()):
        raise ValueError(f"Expected `K` and `L` to be floating point, but got {K.dtype} and {L.dtype}.")


@takes_arrays
def pairwise_hsic(Ks: Tensor, Ls: Tensor, *, unbiased: bool) -> Tensor:
    """Returns `hsic` of every matrix in `Ks` (k, n, n) with every matrix in `Ls` (l, n, n): (k, l), by one product.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> Ks = torch.stack([X @ X.T, Y @ Y.T])
        >>> pairwise_hsic(Ks, Ks, unbiased=True).shape
        torch.Size([2, 2])
    """
    check_num_samples(Ks.shape[-1], unbiased)
    # Both estimators ignore a constant added to rows and columns, so centring first only removes cancellation.
    Ks, Ls = double_centred(Ks), double_centred(Ls)
    a, b = Ks.diagonal(dim1=1, dim2=2), Ls.diagonal(dim1=1, dim2=2)
    n = torch.tensor(Ks.shape[-1], dtype=torch.float64, device=Ks.device)
    return hsic_from_sums(Ks.flatten(1) @ Ls.flatten(1).T, a @ b.T, a.sum(1)[:, None], b.sum(1), n, unbiased)


def self_hsic(Ks: Tensor, *, unbiased: bool) -> Tensor:
    """Returns `hsic` of every matrix in `Ks` (k, n, n) with itself: (k,)."""
    check_num_samples(Ks.shape[-1], unbiased)
    Ks = double_centred(Ks)
    a = Ks.diagonal(dim1=1, dim2=2)
    n = torch.tensor(Ks.shape[-1], dtype=torch.float64, device=Ks.device)
    return hsic_from_sums(Ks.flatten(1).square().sum(1), a.square().sum(1), a.sum(1), a.sum(1), n, unbiased)


def hsic_from_sums(
    cross: Tensor, ab: Tensor, a: Tensor, b: Tensor, n: Tensor, unbiased: bool, rounding: float = 0.0
) -> Tensor:
    """Returns HSIC from sums over a centred pair: `cross = tr(Kc Lc)`, `a`, `b` the traces, `ab` the product of the
    diagonals.

    With rows that sum to zero, `1'K~1 = -a` and `1'K~ L~ 1 = ab`: eq. 5 of Song et al. without an n x n matrix.
    """
    if not unbiased:
        return cross / (n - 1) ** 2
    total = cross - ab + a * b / ((n - 1) * (n - 2)) - 2 * ab / (n - 2)
    return total.masked_fill(is_hsic_rounding(total.abs(), cross + ab, n, rounding), 0.0) / (n * (n - 3))


def is_hsic_rounding(total: Tensor, size: Tensor, n: Tensor | int, rounding: float = 0.0) -> Tensor:
    """Returns whether an unbiased HSIC is what rounding leaves of its terms: `total <= (1e-13 + 1e-15 n) size`.

    The terms cancel to 0 for equidistant samples, and the rest would become an arbitrary ratio. They are sums of `n^2`
    products, whose rounding grows with `n`. Where products are rounded more, the n ones on the diagonal are exact all
    the same, and the n^2 others share what is left of the sum: `4 rounding / n`.
    """
    return total <= (1e-13 + 1e-15 * n + 4 * rounding / n) * size


def cka_from_hsic(hsic_xy: Tensor, hsic_xx: Tensor, hsic_yy: Tensor) -> Tensor:
    """Returns CKA from its three HSIC terms: NaN where a self-HSIC vanishes, and rounding past the bounds cut off."""
    defined = (hsic_xx > 0) & (hsic_yy > 0)
    value = hsic_xy / (hsic_xx.sqrt() * hsic_yy.sqrt())
    return value.clamp(-1, 1).masked_fill(~defined, torch.nan)


def min_num_samples(debiased: bool) -> int:
    """Returns how many samples CKA needs: 2, or 4 for the unbiased HSIC, which divides by n - 3."""
    return 4 if debiased else 2


def check_num_samples(n: int, debiased: bool) -> None:
    """Raise a ValueError if `n` samples are too few for the estimator."""
    needed = min_num_samples(debiased)
    if n < needed:
        raise ValueError(
            f"Expected at least {needed} samples for the {'debiased' if debiased else 'plain'} estimator, but got {n}."
        )
