"""Centred kernel nearest-neighbour alignment (CKNNA): CKA over pairs of near samples alone.

Huh, Cheung, Wang & Isola 2024, "The Platonic Representation Hypothesis" (arXiv 2405.07987), appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.moments import check_features
from lit_cka.functional.nearest_neighbours import (
    WeightedNeighbours,
    check_num_neighbours,
    nearest_neighbours,
    neighbour_products,
)


@takes_arrays
def cknna(X: Tensor, Y: Tensor, *, k: int = 10, tile: int | None = None) -> Tensor:
    """Returns the CKNNA of two sets of features.

        Align(K, L) = sum_ij a_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il)
        CKNNA       = Align(K, L) / sqrt(Align(K, K) Align(L, L))

    with `K_ij`, `L_ij` the cosines of samples, and `a_ij` 1 where `j` is among the `k` nearest other samples of `i`
    in both, else 0. In `Align(K, K)` that is those of `K`. 1 means the same neighbours, equally near but for scale.

    This is the definition in the paper. The authors' code, which others have taken over, puts the masked matrices
    `a K` and `a L` into the unbiased HSIC in place of centring them first; its values differ, and can be negative.
    Neighbours as far off as the k-th all count, as in `mutual_knn`; time and memory are as there.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.
        k: neighbours, from 1 to n - 1.
        tile: rows at a time, see `nearest_neighbours`.

    Returns:
        Float64 scalar in [-1, 1], next to never below 0; NaN as `mutual_knn`.

    Raises:
        ValueError: as `mutual_knn`.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> print(f"{cknna(X, 3 * X.flip(1), k=2):.6f}")
        1.000000
    """
    check_features(X, Y)
    check_num_neighbours(len(X), k)
    x, y = (cknna_weights(features, k, tile=tile) for features in (X, Y))
    return neighbour_products([x], [y], torch.arange(len(X))[None], tile=tile)[0, 0, 0]


def cknna_weights(X: Tensor, k: int, *, tile: int | None = None) -> WeightedNeighbours:
    """Returns the neighbours of each sample with weights `(K_ij - mean_l K_il) / sqrt(Align(K, K))`: the sum of the
    products over those that two sets share is `cknna`.
    """
    found = nearest_neighbours(X, k, tile=tile)
    size = found.closeness.norm()
    return WeightedNeighbours(found.indices, (found.closeness / size).nan_to_num(0.0), found.defined & (size > 0))
