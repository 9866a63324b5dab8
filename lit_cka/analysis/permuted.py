"""The measures of `compare` when the samples of one side are permuted: what they are by chance.

None is computed again from the features. What a measure needs of one side (Gram matrices, distances, neighbours,
principal directions) is the same for permuted samples but for their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_cka.analysis.measures import centred_grams, correlation, directions, neighbours, sampling_factors, similarity
from lit_cka.analysis.rsa import standardized_rdms
from lit_cka.analysis.settings import WITH_MOMENTS, Settings
from lit_cka.functional.nearest_neighbours import neighbour_products
from lit_cka.functional.permutations import permuted_products
from lit_cka.functional.procrustes import unit_shape
from lit_cka.functional.rsa import rdm

_ELEMENTS = 2**22  # of permuted features at a time


def permuted_similarity(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings, orders: Tensor) -> Tensor:
    """Returns `similarity` of `Xs` with `Ys` whose samples are in each of the `orders` (t, n): (t, k, l), float64.

    "minibatch_cka" and the "kendall" correlation of "rsa" have no short cut, and take as long as computing them t
    times.
    """
    measure = settings.measure
    if measure in WITH_MOMENTS:
        Ks = centred_grams(Xs, settings)
        values = permuted_products(Ks, Ks if Xs is Ys else centred_grams(Ys, settings), orders)
        return values * sampling_factors(Xs, Ys) if measure == "sampled_features_cka" else values
    if measure == "rsa" and settings.comparison != "kendall":
        Rs, Ss = (
            standardized_rdms(torch.stack([rdm(X, settings.distance) for X in layers]), settings.comparison)
            for layers in (Xs, Ys)
        )
        return permuted_products(Rs, Ss, orders)
    if measure in ("mutual_knn", "cknna"):
        return neighbour_products(neighbours(Xs, settings), neighbours(Ys, settings), orders)
    if measure in ("svcca", "pwcca"):
        return _of_directions(Xs, Ys, settings, orders)
    if measure == "procrustes":
        return _of_shapes(Xs, Ys, orders)
    return torch.stack([similarity(Xs, [Y[order] for Y in Ys], settings) for order in orders])


def _of_directions(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings, orders: Tensor) -> Tensor:
    x, y = directions(Xs, settings), directions(Ys, settings)
    values = x[0].U.new_empty(len(orders), len(x), len(y))
    for j, of_y in enumerate(y):
        for some, part in zip(_chunks(orders, of_y.U), _chunks(values, of_y.U), strict=True):
            for i, of_x in enumerate(x):
                part[:, i, j] = correlation(of_x, of_y, some, measure=settings.measure)
    return values


def _of_shapes(Xs: Sequence[Tensor], Ys: Sequence[Tensor], orders: Tensor) -> Tensor:
    x, y = [unit_shape(X) for X in Xs], [unit_shape(Y) for Y in Ys]
    values = x[0].new_full((len(orders), len(x), len(y)), torch.nan)
    for j, of_y in enumerate(y):
        for some, part in zip(_chunks(orders, of_y), _chunks(values, of_y), strict=True):
            moved = of_y[some]
            for i, of_x in enumerate(x):
                if of_x.isfinite().all() and of_y.isfinite().all():
                    part[:, i, j] = (2 - 2 * torch.linalg.svdvals(of_x.T @ moved).sum(dim=-1)).clamp(min=0)
    return values


def _chunks(rows: Tensor, moved: Tensor) -> Sequence[Tensor]:
    """Returns so many rows at a time as features may be moved at once; of `values`, they are views."""
    chunks: Sequence[Tensor] = rows.split(max(1, _ELEMENTS // moved.numel()))
    return chunks
