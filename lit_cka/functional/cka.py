"""Centred kernel alignment (CKA) and the Hilbert-Schmidt independence criterion (HSIC).

Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited" (arXiv 1905.00414): linear CKA, eq. 4.
Song et al. 2012, "Feature Selection via Dependence Maximization" (JMLR 13), eq. 5: the unbiased HSIC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, check_features, paired_moments

# A variance below this many times float64's resolution of the mean is rounding, not signal: such features are constant.
_ROUNDING = (16 * torch.finfo(torch.float64).eps) ** 2


def linear_cka(X: Tensor, Y: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear CKA of two sets of features of the same samples.

        CKA = ||Xc' Yc||_F^2 / (||Xc' Xc||_F ||Yc' Yc||_F)          Xc, Yc centred by column

    1 means equal up to rotation and isotropic scaling, 0 unrelated. The plain estimator is biased upward when `n` is
    small against the widths; `debiased=True` replaces each of the three terms by the unbiased HSIC.

    Computed in float64, through the samples' Gram matrices where `n` is below the widths (cost `n^2 d`) and through
    the feature moments elsewhere (cost `n d^2`): the two forms are equal.

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
    _check_num_samples(len(X), debiased)
    if len(X) < max(X.shape[1], Y.shape[1]):
        X64, Y64 = X.detach().to(torch.float64), Y.detach().to(torch.float64)
        return cka_from_gram(_centred_gram(X64), _centred_gram(Y64), debiased=debiased)
    return cka_from_moments(paired_moments(X, Y), debiased=debiased)


def cka_from_moments(moments: PairedMoments, *, debiased: bool = False) -> Tensor:
    """Linear CKA of the samples that `moments` describe: the value of `linear_cka` on all of them at once.

    Returns a float64 scalar; NaN for constant or non-finite features and for fewer than 2 samples (4 if debiased).
    """
    n, a, b = moments.n, moments.a, moments.b
    hsic_xy = _hsic(moments.xy.square().sum(), moments.ab, a, b, n, debiased)
    hsic_xx = _hsic(moments.xx.square().sum(), moments.aa, a, a, n, debiased)
    hsic_yy = _hsic(moments.yy.square().sum(), moments.bb, b, b, n, debiased)
    constant_x = a <= n * _ROUNDING * moments.mean_x.square().sum()
    constant_y = b <= n * _ROUNDING * moments.mean_y.square().sum()
    value = _ratio(hsic_xy, hsic_xx, hsic_yy)
    return value.masked_fill(constant_x | constant_y | (n < (4 if debiased else 2)), torch.nan)


def cka_from_gram(K: Tensor, L: Tensor, *, debiased: bool = False) -> Tensor:
    """CKA of two Gram (kernel) matrices (n, n) of the same samples, any kernel; they need not be centred.

    Returns a float64 scalar, NaN where a matrix is constant after centring. Raises as `hsic`.
    """
    return _ratio(hsic(K, L, unbiased=debiased), hsic(K, K, unbiased=debiased), hsic(L, L, unbiased=debiased))


def hsic(K: Tensor, L: Tensor, *, unbiased: bool) -> Tensor:
    """Hilbert-Schmidt independence criterion of two Gram matrices (n, n), in float64.

        biased    tr(K H L H) / (n - 1)^2                                                H = I - 11'/n
        unbiased  [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~ L~ 1 / (n-2)] / (n (n-3))

    where `K~`, `L~` have their diagonal set to zero (Song et al. 2012, eq. 5).

    Raises:
        ValueError: unless both matrices are floating point, square, of equal size, and n >= 2 (biased) or 4 (unbiased).
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.shape != L.shape:
        raise ValueError(
            "Expected `K` and `L` to be square matrices of the same size (samples, samples), "
            f"but got {tuple(K.shape)} and {tuple(L.shape)}."
        )
    if not (K.is_floating_point() and L.is_floating_point()):
        raise ValueError(f"Expected `K` and `L` to be floating point, but got {K.dtype} and {L.dtype}.")
    return pairwise_hsic(K[None], L[None], unbiased=unbiased)[0, 0]


def pairwise_hsic(Ks: Tensor, Ls: Tensor, *, unbiased: bool) -> Tensor:
    """`hsic` of every matrix in `Ks` (k, n, n) with every matrix in `Ls` (l, n, n): (k, l), by one product."""
    _check_num_samples(Ks.shape[-1], unbiased)
    # Both estimators ignore a constant added to rows and columns, so centring first only removes cancellation.
    Ks, Ls = _double_centred(Ks.detach().to(torch.float64)), _double_centred(Ls.detach().to(torch.float64))
    a, b = Ks.diagonal(dim1=1, dim2=2), Ls.diagonal(dim1=1, dim2=2)
    n = torch.tensor(Ks.shape[-1], dtype=torch.float64, device=Ks.device)
    return _hsic(Ks.flatten(1) @ Ls.flatten(1).T, a @ b.T, a.sum(1)[:, None], b.sum(1), n, unbiased)


def own_hsic(Ks: Tensor, *, unbiased: bool) -> Tensor:
    """`hsic` of every matrix in `Ks` (k, n, n) with itself: (k,)."""
    _check_num_samples(Ks.shape[-1], unbiased)
    Ks = _double_centred(Ks.detach().to(torch.float64))
    a = Ks.diagonal(dim1=1, dim2=2)
    n = torch.tensor(Ks.shape[-1], dtype=torch.float64, device=Ks.device)
    return _hsic(Ks.flatten(1).square().sum(1), a.square().sum(1), a.sum(1), a.sum(1), n, unbiased)


def _hsic(cross: Tensor, ab: Tensor, a: Tensor, b: Tensor, n: Tensor, unbiased: bool) -> Tensor:
    """HSIC from sums over a centred pair: `cross = tr(Kc Lc)`, `a`, `b` the traces, `ab` the diagonals' product.

    With rows that sum to zero, `1'K~1 = -a` and `1'K~ L~ 1 = ab`: eq. 5 of Song et al. without an n x n matrix.
    """
    if not unbiased:
        return cross / (n - 1) ** 2
    total = cross - ab + a * b / ((n - 1) * (n - 2)) - 2 * ab / (n - 2)
    # The terms cancel to 0 for equidistant samples; what rounding leaves then would become an arbitrary ratio.
    return total.masked_fill(total.abs() <= (1e-13 + 1e-15 * n) * (cross + ab), 0.0) / (n * (n - 3))


def _ratio(hsic_xy: Tensor, hsic_xx: Tensor, hsic_yy: Tensor) -> Tensor:
    """CKA from its three HSIC terms: NaN where a self-term vanishes, and rounding past the bounds cut off."""
    defined = (hsic_xx > 0) & (hsic_yy > 0)
    value = hsic_xy / (hsic_xx.sqrt() * hsic_yy.sqrt())
    return value.clamp(-1, 1).masked_fill(~defined, torch.nan)


def _double_centred(K: Tensor) -> Tensor:
    size = K.abs().amax(dim=(-2, -1), keepdim=True)
    K = K - K[..., :1, :1]  # so that a constant matrix centres to exact zeros
    K = K - K.mean(dim=-2, keepdim=True) - K.mean(dim=-1, keepdim=True) + K.mean(dim=(-2, -1), keepdim=True)
    rounding = K.abs().amax(dim=(-2, -1), keepdim=True) <= 16 * torch.finfo(torch.float64).eps * size
    return K.masked_fill(rounding, 0.0)


def _centred_gram(features: Tensor) -> Tensor:
    centred = features - features[:1]
    centred = centred - centred.mean(dim=0)
    # Constant features: as in `cka_from_moments`, what rounding leaves of them is no signal.
    constant = centred.square().sum() <= len(features) * _ROUNDING * features[0].square().sum()
    return (centred @ centred.T).masked_fill(constant, 0.0)


def _check_num_samples(n: int, debiased: bool) -> None:
    needed = 4 if debiased else 2
    if n < needed:
        raise ValueError(
            f"Expected at least {needed} samples for the {'debiased' if debiased else 'plain'} estimator, but got {n}."
        )
