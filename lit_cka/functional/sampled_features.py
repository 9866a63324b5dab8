"""CKA corrected for features that are a sample: of neurons recorded in a brain, or of units taken from a wide layer.

Chun, Canatar, Chung & Lee 2025, "Estimating Neural Representation Alignment from Sparsely Sampled Inputs and Features"
(arXiv 2502.15104).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred
from lit_cka.functional.cka import check_num_samples, hsic_from_sums, linear_cka
from lit_cka.functional.moments import check_features
from lit_cka.functional.units import in_usual_unit

_ROWS = 256  # of a product at a time


@takes_arrays
def sampled_features_cka(X: Tensor, Y: Tensor) -> Tensor:
    """Returns an estimate of the linear CKA that all features of two populations would have, from a sample of each.

        HSIC_1(X, Y) / sqrt(C(X) C(Y))
        C(X) = 1 / (d (d - 1)) sum_{a != b} HSIC_1(x_a, x_b) = d / (d - 1) [HSIC_1(X, X) - 1 / d^2 sum_a HSIC_1(x_a,
        x_a)]

    with `HSIC_1` the unbiased HSIC (Song et al. 2012) of the kernels `1/d XX'` and, for a single feature `x_a` (n,),
    `x_a x_a'`. Each of the three terms is a U-statistic over samples and features both, unbiased if samples are drawn
    at random and the features of `X` and of `Y` independently of each other. The debiased CKA has `HSIC_1(X, X)` in
    place of `C(X)`, where a feature is compared with itself: few features then look less similar than their
    populations are.

    The features of the same units in two versions of one network are not drawn independently: for these take the
    debiased CKA. Features that equal the others are, by definition, at 1.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.

    Returns:
        Float64 scalar, an estimate that may be above 1 or below 0; NaN where the estimate of a `C` is not positive,
        as of a single feature, and where features are the same for all samples or not finite.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, or fewer than 4 samples.

    Example:
        >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(2, 500, 20, generator=torch.Generator().manual_seed(1))
        >>> X, Y = noise + z.sum(1, keepdim=True)
        >>> print(f"{linear_cka(X, Y, debiased=True):.2f} {sampled_features_cka(X, Y):.2f}")
        0.96 1.00
    """
    check_features(X, Y)
    check_num_samples(len(X), debiased=True)
    if torch.equal(X, Y):
        return linear_cka(X, Y, debiased=True)
    return linear_cka(X, Y, debiased=True) * feature_sampling_factor(X) * feature_sampling_factor(Y)


def feature_sampling_factor(X: Tensor) -> Tensor:
    """Returns `sqrt(HSIC_1(X, X) / C(X))`, by which the debiased CKA with any other features is to be multiplied."""
    x = centred(in_usual_unit(X))
    n, d = x.shape
    num_samples = torch.tensor(n, dtype=torch.float64, device=x.device)
    a, squares = x.square().sum(dim=1), x.square()
    # ||Xc' Xc||_F^2, or the same of the samples' Gram matrix, some rows at a time.
    left = x.T if d <= n else x
    cross = torch.stack([(rows @ left.T).square().sum() for rows in left.split(_ROWS)]).sum()
    whole = hsic_from_sums(cross, a @ a, a.sum(), a.sum(), num_samples, unbiased=True)
    # Of each feature with itself: the kernel x_a x_a' has the squares on its diagonal.
    sums, fourth = squares.sum(dim=0), squares.square().sum(dim=0)
    single = hsic_from_sums(sums.square(), fourth, sums, sums, num_samples, unbiased=True).sum()
    different = (whole - single) * (d / (d - 1)) if d > 1 else whole * 0
    return (whole / different).sqrt().masked_fill(~((whole > 0) & (different > 0)), torch.nan)
