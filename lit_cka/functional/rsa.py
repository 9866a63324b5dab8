"""Representational dissimilarity matrices (RDMs): what representational similarity analysis compares.

Kriegeskorte et al. 2008, "Representational similarity analysis" (Frontiers in Systems Neuroscience 2).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import ROUNDING, is_rounding

Distance = Literal["cosine", "correlation", "euclidean"]


@takes_arrays
def rdm(X: Tensor, distance: Distance = "correlation") -> Tensor:
    """Returns the distances between the samples' features, in float64.

        cosine       1 - x.y / (||x|| ||y||)                     in [0, 2]
        correlation  the cosine distance after subtracting from each sample the mean of its features
        euclidean    ||x - y||

    The cosine distance depends on where the features are measured from: they are taken as they come.

    Args:
        X: features (n, d), any floating dtype.
        distance: `cosine`, `correlation` or `euclidean`.

    Returns:
        Float64 (n, n), symmetric, 0 on the diagonal. A sample without a direction (all its features zero, or for
        `correlation` all equal) has NaN distances to all, itself included; so has one that holds NaN or infinity.

    Raises:
        ValueError: on an unknown distance, integer features or another shape.

    Example:
        >>> rdm(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]), "cosine")
        tensor([[0., 1., 2.],
                [1., 0., 1.],
                [2., 1., 0.]], dtype=torch.float64)
    """
    if distance not in get_args(Distance):
        raise ValueError(f"Expected `distance` to be one of {get_args(Distance)}, but got {distance!r}.")
    if X.ndim != 2 or not X.is_floating_point():
        raise ValueError(
            f"Expected `X` to be floating point, of shape (samples, features), but got {X.dtype}, {tuple(X.shape)}."
        )
    x = X.detach().to(torch.float64)
    x = x.masked_fill(~x.isfinite().all(dim=1, keepdim=True), torch.nan)
    distances = _euclidean(x) if distance == "euclidean" else _angular(x, centre=distance == "correlation")
    distances = (distances + distances.T) / 2  # a matrix product may round the two halves differently
    diagonal = distances.diagonal()
    diagonal.masked_fill_(~diagonal.isnan(), 0.0)
    return distances


def _angular(x: Tensor, centre: bool) -> Tensor:
    size = x.norm(dim=1, keepdim=True)
    if centre:
        x = x - x.mean(dim=1, keepdim=True)
    length = x.norm(dim=1, keepdim=True)
    unit = (x / length).masked_fill(is_rounding(length, size), torch.nan)
    distances: Tensor = 1 - unit @ unit.T
    return distances.masked_fill(distances <= ROUNDING, 0.0).clamp(max=2)  # repeated samples: exactly 0


def _euclidean(x: Tensor) -> Tensor:
    lengths = x.square().sum(dim=1)
    x = x - x.nanmean(dim=0)  # distances ignore it; products of far-off features would cancel
    squares = x.square().sum(dim=1)
    sums = squares[:, None] + squares
    squared: Tensor = sums - 2 * x @ x.T
    cancelled = is_rounding(squared, sums) | (squared <= ROUNDING**2 * (lengths[:, None] + lengths))
    return squared.masked_fill(cancelled, 0.0).sqrt()  # repeated samples: exactly 0
