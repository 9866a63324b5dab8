"""The nearest neighbours of each sample among the others, row tile by row tile, and what two sets of them share.

What local measures start from. By cosine distance, on features as they come, as Huh et al. 2024 ("The Platonic
Representation Hypothesis", arXiv 2405.07987) have it. No matrix of samples by samples is held: a tile of its rows is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.centring import centred
from lit_cka.functional.units import in_usual_unit

_TILE_ELEMENTS = 2**22  # of all rows that are held at once, 32 MiB in float64
_TIE = 1e-12  # of squared distances, relative: what differs by less differs by rounding


class Neighbours(NamedTuple):
    """Who is near to each of `n` samples, `w` at most; rows that are shorter end in a weight of 0.

    `w` is `k`, or more where several samples are as far off as the `k`-th: all of them count, since any choice among
    them would be by their order in the data, which two layers share.
    """

    indices: Tensor  # (n, w), int64
    closeness: Tensor  # (n, w), float64: how much more similar than the mean of all samples; see `nearest_neighbours`
    present: Tensor  # (n, w), float64: 1, or 0 where a row has ended
    defined: Tensor  # (), whether the features say who is near


def check_num_neighbours(n: int, k: int) -> None:
    """Raise a ValueError unless each of `n` samples has `k` others."""
    if k < 1:
        raise ValueError(f"Expected `k`, the number of neighbours, to be at least 1, but got {k}.")
    if n < 2:
        raise ValueError(f"Expected at least 2 samples, but got {n}.")
    if k > n - 1:
        raise ValueError(
            f"Expected `k` to be at most n - 1 = {n - 1}, the number of other samples, but got {k}. Ask for fewer "
            "neighbours, or give more samples."
        )


def nearest_neighbours(X: Tensor, k: int, *, tile: int | None = None) -> Neighbours:
    """Returns the `k` nearest neighbours of each sample by cosine distance.

    With unit rows `u_i`, cosines are taken from `2 - 2 u_i.u_j = ||u_i - u_j||^2`, measured from the mean of all `u`:
    for features far from 0, whose cosines are all next to 1, products of the rows themselves would be rounding. The
    closeness is `u_i.u_j - mean_l u_i.u_l`, over all samples `l`.

    Args:
        X: features (n, d), any floating dtype; computed in float64.
        k: from 1 to n - 1.
        tile: rows at a time; None for what fits into 32 MiB. It changes no value.

    Returns:
        The neighbours; not defined where features are the same for all samples, hold NaN or infinity, or a sample's are
        all 0 and have no direction.

    Raises:
        ValueError: as `check_num_neighbours`.
    """
    n = len(X)
    check_num_neighbours(n, k)
    x = X.detach().to(torch.float64)
    largest = x.abs().amax(dim=1, keepdim=True)
    defined = largest.isfinite().all() & (largest > 0).all() & centred(in_usual_unit(x)).any()
    x = (x / largest).nan_to_num(0.0, 0.0, 0.0)
    u = (x / x.norm(dim=1, keepdim=True)).nan_to_num(0.0)
    u = u - u.mean(dim=0)
    squares = u.square().sum(dim=1)
    rows = tile or max(_TILE_ELEMENTS // n, 1)
    parts = [_rows_of(u, squares, start, min(start + rows, n), k) for start in range(0, n, rows)]
    width = max(part[0].shape[1] for part in parts)
    indices, closeness, present = (torch.cat([_widened(part[field], width) for part in parts]) for field in range(3))
    return Neighbours(indices, closeness, present, defined)


def _rows_of(u: Tensor, squares: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns indices, closeness and presence of the neighbours of some samples."""
    distances = (squares[start:stop, None] + squares - 2 * u[start:stop] @ u.T).clamp(min=0)
    itself = torch.arange(start, stop, device=u.device)[:, None]
    mean = distances.scatter(1, itself, 0.0).mean(dim=1, keepdim=True)
    distances.scatter_(1, itself, torch.inf)
    farthest = distances.kthvalue(k, dim=1, keepdim=True).values
    tie = _TIE * (squares[start:stop, None] + squares.mean())
    counts = (distances <= farthest + tie).sum(dim=1, keepdim=True)
    nearest = distances.topk(int(counts.max()), dim=1, largest=False, sorted=True)
    present = torch.arange(nearest.indices.shape[1], device=u.device) < counts
    closeness = ((mean - nearest.values) / 2).masked_fill(~present, 0.0)
    return nearest.indices, closeness, present.to(torch.float64)


def _widened(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


class WeightedNeighbours(NamedTuple):
    """Neighbours with the weights that a measure gives them, of a norm of 1 as one vector."""

    indices: Tensor  # (n, w)
    weights: Tensor  # (n, w)
    defined: Tensor  # ()


def neighbour_products(
    As: Sequence[WeightedNeighbours], Bs: Sequence[WeightedNeighbours], orders: Tensor, *, tile: int | None = None
) -> Tensor:
    """Returns `sum_ij A_ij B_p(i)p(j)` over the neighbours that both have, for each permutation `p` of the samples of
    `B`.

    `A_ij` is the weight of sample `j` among the neighbours of `i`, and 0 where it is none.

    Args:
        As: of a layers.
        Bs: of b layers, of the same n samples.
        orders: permutations (t, n).
        tile: rows at a time; None for what fits into 32 MiB, all `As` together.

    Returns:
        Float64 (t, a, b), NaN where either is not defined.
    """
    n, a = len(As[0].indices), len(As)
    width = max(B.indices.shape[1] for B in Bs)
    indices = torch.stack([_widened(B.indices, width) for B in Bs])  # (b, n, w)
    weights = torch.stack([_widened(B.weights, width) for B in Bs])
    places = torch.argsort(orders.to(indices.device), dim=1)  # where each sample has gone to
    sums = weights.new_zeros(len(orders), a, len(Bs))
    rows = tile or max(_TILE_ELEMENTS // (n * a), 1)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        first = torch.arange(stop - start, device=indices.device)[:, None] * n
        dense = weights.new_zeros((stop - start) * n, a)  # all `As` side by side: one look-up finds them together
        for column, A in zip(dense.T, As, strict=True):
            # The ends of rows add 0.
            column.index_add_(0, (first + A.indices[start:stop]).flatten(), A.weights[start:stop].flatten())
        for total, order, place in zip(sums, orders.to(indices.device), places, strict=True):
            moved = order[start:stop]
            found = dense.index_select(0, (first + place[indices[:, moved]]).flatten())
            total += torch.bmm(weights[:, moved].flatten(1)[:, None], found.view(len(Bs), -1, a))[:, 0].T
    defined = torch.stack([A.defined for A in As])[:, None] & torch.stack([B.defined for B in Bs])
    return sums.masked_fill(~defined, torch.nan)
