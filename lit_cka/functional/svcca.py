"""Singular vector canonical correlation analysis (SVCCA).

Raghu, Gilmer, Yosinski & Sohl-Dickstein 2017, "SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning
Dynamics and Interpretability" (arXiv 1706.05806), section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred
from lit_cka.functional.moments import check_features
from lit_cka.functional.units import in_usual_unit


class PrincipalDirections(NamedTuple):
    """The first `r` principal directions of centred features, `Xc ~ U diag(S) V'`; NaN where features are undefined."""

    U: Tensor  # (n, r)
    S: Tensor  # (r,)
    Vh: Tensor  # (r, d)


@takes_arrays
def svcca(X: Tensor, Y: Tensor, *, variance: float = 0.99) -> Tensor:
    """Returns the SVCCA of two sets of features: the mean of the canonical correlations of their largest directions.

        SVCCA = 1/m sum_i rho_i,  rho the singular values of U_x' U_y,  m = min(r_x, r_y)

    with `U_x` (n, r_x), `U_y` (n, r_y) the left singular vectors of the centred features that hold `variance` of the
    sum of squares, the fewest that do. It is the same after any invertible linear map that leaves these directions
    together, and so counts a direction of little variance as much as a large one.

    With about as many directions as samples it is close to 1 for any two features: calibrate it, or take more samples.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.
        variance: share of the variance that is kept, in (0, 1].

    Returns:
        Float64 scalar in [0, 1]; NaN where features are the same for all samples or not finite.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, fewer than 2 samples, or `variance` out of range.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
        >>> print(f"{svcca(X, X @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]) + 7, variance=1.0):.6f}")
        1.000000
    """
    check_features(X, Y, min_num_samples=2)
    x, y = (principal_directions(features, variance) for features in (X, Y))
    return mean_correlation(x.U.T @ y.U)


def mean_correlation(products: Tensor) -> Tensor:
    """Returns the mean of the singular values of products of orthonormal bases (..., r, s): (...)."""
    undefined = ~products.isfinite().all(dim=-1).all(dim=-1)
    values: Tensor = torch.linalg.svdvals(products.nan_to_num(0.0, 0.0, 0.0)).mean(dim=-1)
    return values.clamp(max=1).masked_fill(undefined, torch.nan)


def principal_directions(X: Tensor, variance: float = 1.0) -> PrincipalDirections:
    """Returns the fewest principal directions of the features that hold a share of the variance; all for 1.

    What is below `s_1 max(n, d) eps` is rounding and no direction.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"Expected `variance`, the share that is kept, to be in (0, 1], but got {variance}.")
    Xc = centred(in_usual_unit(X))
    if not Xc.isfinite().all() or not Xc.any():
        nan = Xc.new_tensor(torch.nan)
        return PrincipalDirections(nan.expand(len(Xc), 1), nan.expand(1), nan.expand(1, Xc.shape[1]))
    U, S, Vh = torch.linalg.svd(Xc, full_matrices=False)
    held = S.square().cumsum(0) / S.square().sum()
    enough = int((held < variance * (1 - 1e-12)).sum()) + 1
    smallest = S[0] * max(Xc.shape) * torch.finfo(torch.float64).eps
    rank = int((smallest < S).sum())
    kept = min(enough, rank) if variance < 1 else rank
    return PrincipalDirections(U[:, :kept], S[:kept], Vh[:kept])
