"""Mutual nearest neighbours: do two sets of features agree on who is near to whom?

Huh, Cheung, Wang & Isola 2024, "The Platonic Representation Hypothesis" (arXiv 2405.07987), section 2 and appendix A.
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
def mutual_knn(X: Tensor, Y: Tensor, *, k: int = 10, tile: int | None = None) -> Tensor:
    """Returns which share of the `k` nearest neighbours of a sample is the same in both, on average over the samples.

        m_kNN = 1/n sum_i |S(x_i) & S(y_i)| / k          S the k nearest other samples, by cosine

    1 means the same neighbours. Of unrelated features `k / (n - 1)` is expected, whatever their widths. Only the
    order of distances from each sample counts, and only of the nearest. Where samples are as far off as the k-th
    neighbour (a repeated image, features of few values), all of them are neighbours, and `k` above is `sqrt(|S(x_i)|
    |S(y_i)|)`.

    Exact: rows of the distances are computed some at a time, in `n^2 (d_x + d_y)` multiplications and no memory but the
    features', `n k` numbers and a tile.

    Args:
        X: features (n, d_x), any floating dtype; computed in float64.
        Y: features (n, d_y), same samples in the same order.
        k: neighbours, from 1 to n - 1.
        tile: rows at a time, see `nearest_neighbours`.

    Returns:
        Float64 scalar in [0, 1]; NaN where features are the same for all samples, are not finite, or all 0 for a
        sample.

    Raises:
        ValueError: on integer features, wrong shapes, unequal `n`, fewer than 2 samples, or `k` larger than n - 1.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> print(mutual_knn(X, 3 * X.flip(1), k=1).item())
        1.0
    """
    check_features(X, Y)
    check_num_neighbours(len(X), k)
    x, y = (mutual_knn_weights(features, k, tile=tile) for features in (X, Y))
    return neighbour_products([x], [y], torch.arange(len(X))[None], tile=tile)[0, 0, 0]


def mutual_knn_weights(X: Tensor, k: int, *, tile: int | None = None) -> WeightedNeighbours:
    """Returns the neighbours of each sample, all with the weight `1 / sqrt(n |S|)`: the sum over those that two
    sets share is `mutual_knn`.
    """
    found = nearest_neighbours(X, k, tile=tile)
    weights = found.present / (len(X) * found.present.sum(dim=1, keepdim=True)).sqrt()
    return WeightedNeighbours(found.indices, weights, found.defined)
