"""What can be computed of two models' features: `similarity` gives the matrix of the measure that `Settings` name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lit_cka.analysis.rsa import pairwise_rsa
from lit_cka.analysis.settings import Settings
from lit_cka.functional.centring import double_centred
from lit_cka.functional.cka import cka_from_hsic, min_num_samples, pairwise_hsic, self_hsic
from lit_cka.functional.cknna import cknna_weights
from lit_cka.functional.jackknife import u_centred
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.matrix import cka_matrix
from lit_cka.functional.moments import check_features
from lit_cka.functional.mutual_knn import mutual_knn_weights
from lit_cka.functional.nearest_neighbours import WeightedNeighbours, neighbour_products
from lit_cka.functional.procrustes import procrustes_distance
from lit_cka.functional.pwcca import weighted_correlation
from lit_cka.functional.rsa import rdm
from lit_cka.functional.sampled_features import feature_sampling_factor
from lit_cka.functional.svcca import PrincipalDirections, mean_correlation, principal_directions
from lit_cka.functional.units import in_usual_unit

_T = TypeVar("_T")


def similarity(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    """Returns the measure of every layer of `Xs` with every layer of `Ys`: (k, l), float64; `Ys` may be `Xs` itself."""
    return _MEASURES[settings.measure](Xs, Ys, settings)


def gram_matrices(layers: Sequence[Tensor], settings: Settings) -> Tensor:
    """Returns the samples' Gram matrices (layers, n, n) by the measure's kernel, float64, of features in their unit."""
    return torch.stack([_gram(X, settings) for X in layers])


def _gram(X: Tensor, settings: Settings) -> Tensor:
    X = in_usual_unit(X)
    return rbf_gram(X, bandwidth=settings.bandwidth) if settings.measure == "rbf_cka" else linear_gram(X)


def centred_grams(layers: Sequence[Tensor], settings: Settings) -> Tensor:
    """Returns the matrices (layers, n, n) whose cosines are the CKA of the settings' estimator."""
    debiased = settings.debiased or settings.measure == "sampled_features_cka"
    grams = (double_centred(_gram(X, settings)) for X in layers)  # one at a time: each is n x n
    return torch.stack([u_centred(K) if debiased else K for K in grams])


def neighbours(layers: Sequence[Tensor], settings: Settings) -> list[WeightedNeighbours]:
    """Returns the nearest neighbours of all samples in each layer, weighted as the measure does."""
    weights = cknna_weights if settings.measure == "cknna" else mutual_knn_weights
    return [weights(X, settings.num_neighbours) for X in layers]


def directions(layers: Sequence[Tensor], settings: Settings) -> list[PrincipalDirections]:
    """Returns the principal directions of each layer, as many as the measure keeps."""
    variance = settings.variance if settings.measure == "svcca" else 1.0
    return [principal_directions(X, variance) for X in layers]


def sampling_factors(Xs: Sequence[Tensor], Ys: Sequence[Tensor]) -> Tensor:
    """Returns what `sampled_features_cka` is to the debiased CKA, for every pair (k, l); 1 for equal features."""
    x = torch.stack([feature_sampling_factor(X) for X in Xs])
    y = x if Xs is Ys else torch.stack([feature_sampling_factor(Y) for Y in Ys])
    equal = torch.tensor([[torch.equal(X, Y) for Y in Ys] for X in Xs])
    return torch.outer(x, y).masked_fill(equal.to(x.device), 1.0)


def every_pair(measure: Callable[[_T, _T], Tensor], Xs: Sequence[_T], Ys: Sequence[_T]) -> Tensor:
    """Returns a measure of every one of `Xs` with every one of `Ys`, as a matrix (k, l, ...)."""
    return torch.stack([torch.stack([measure(X, Y) for Y in Ys]) for X in Xs])


def _cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    return cka_matrix(Xs, Ys, debiased=settings.debiased)


def _minibatch_cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    from lit_cka.metrics import MinibatchCKA

    metric, needed = MinibatchCKA(), min_num_samples(debiased=True)
    if len(Xs[0]) < needed:
        raise ValueError(f"Expected at least {needed} samples for a batch, but got {len(Xs[0])}.")
    for start in range(0, len(Xs[0]), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        if len(Xs[0][part]) >= needed:
            metric.update([X[part] for X in Xs], [Y[part] for Y in Ys])
    return metric.compute()


def _rbf_cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    Ks = gram_matrices(Xs, settings)
    Ls = Ks if Xs is Ys else gram_matrices(Ys, settings)
    cross, of_x, of_y = (
        pairwise_hsic(Ks, Ls, unbiased=settings.debiased),
        *(self_hsic(grams, unbiased=settings.debiased) for grams in (Ks, Ls)),
    )
    return cka_from_hsic(cross, of_x[:, None], of_y)


def _sampled_features_cka(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    return cka_matrix(Xs, Ys, debiased=True) * sampling_factors(Xs, Ys)


def _rsa(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    Rs = torch.stack([rdm(X, settings.distance) for X in Xs])
    Ss = Rs if Xs is Ys else torch.stack([rdm(Y, settings.distance) for Y in Ys])
    return pairwise_rsa(Rs, Ss, settings.comparison)


def _procrustes(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    return every_pair(procrustes_distance, Xs, Ys)


def _by_neighbours(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    for layer in (*Xs, *Ys):
        check_features(Xs[0], layer)
    x = neighbours(Xs, settings)
    y = x if Xs is Ys else neighbours(Ys, settings)
    return neighbour_products(x, y, torch.arange(len(Xs[0]))[None])[0]


def _by_directions(Xs: Sequence[Tensor], Ys: Sequence[Tensor], settings: Settings) -> Tensor:
    for layer in (*Xs, *Ys):
        check_features(Xs[0], layer, min_num_samples=2)
    x = directions(Xs, settings)
    y = x if Xs is Ys else directions(Ys, settings)
    return every_pair(partial(correlation, measure=settings.measure), x, y)


def correlation(x: PrincipalDirections, y: PrincipalDirections, order: Tensor | None = None, *, measure: str) -> Tensor:
    """Returns SVCCA or PWCCA from the directions of both sides, `y` in some `order` (..., n) of the samples or none."""
    products = x.U.T @ (y.U if order is None else y.U[order])
    return mean_correlation(products) if measure == "svcca" else weighted_correlation(products, x)


_MEASURES = {
    "cka": _cka,
    "minibatch_cka": _minibatch_cka,
    "rbf_cka": _rbf_cka,
    "sampled_features_cka": _sampled_features_cka,
    "rsa": _rsa,
    "procrustes": _procrustes,
    "svcca": _by_directions,
    "pwcca": _by_directions,
    "mutual_knn": _by_neighbours,
    "cknna": _by_neighbours,
}
