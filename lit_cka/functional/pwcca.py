"""Projection-weighted canonical correlation analysis (PWCCA).

Morcos, Raghu & Bengio 2018, "Insights on representational similarity in neural networks with canonical correlation"
(arXiv 1806.05759), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.moments import check_features
from lit_cka.functional.svcca import PrincipalDirections, principal_directions


@takes_arrays
def pwcca(X: Tensor, Y: Tensor) -> Tensor:
    """Returns the PWCCA of two sets of features: canonical correlations, weighted by how much of `X` they account for.

        PWCCA = sum_i a_i rho_i / sum_i a_i          a_i = sum_j |h_i . x_j|

    with `rho_i` the canonical correlations of the centred features, `h_i` (n,) the canonical variates of `X`, of unit
    norm, and `x_j` its features, the columns of `X`. The weights are those of the first argument, so that `pwcca(X,
    Y)` and `pwcca(Y, X)` differ, as in the paper. (The authors' code takes those of the side with fewer directions.)

    With `n` no larger than the widths together, some correlations are 1 for any two features; with `n` no larger than
    one width, all are: calibrate it, or take more samples.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.

    Returns:
        Float64 scalar in [0, 1]; NaN where features are the same for all samples or not finite.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, or fewer than 2 samples.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
        >>> print(f"{pwcca(X, X @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]) + 7):.6f}")
        1.000000
    """
    check_features(X, Y, min_num_samples=2)
    x, y = principal_directions(X), principal_directions(Y)
    return weighted_correlation(x.U.T @ y.U, x)


def weighted_correlation(products: Tensor, x: PrincipalDirections) -> Tensor:
    """Returns PWCCA (...) from the products (..., r, s) of the first side's directions with those of others."""
    undefined = ~products.isfinite().all(dim=-1).all(dim=-1)
    left, correlations, _ = torch.linalg.svd(products.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)
    # The variates are U_x left, and U_x' Xc = diag(S) V'.
    weights = (left.mT @ (x.S[:, None] * x.Vh)).abs().sum(dim=-1)
    values: Tensor = (weights * correlations.clamp(max=1)).sum(dim=-1) / weights.sum(dim=-1)
    return values.masked_fill(undefined, torch.nan)
