"""All layers of several models on several datasets as points of one map: `project`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_cka.analysis.features import Features, matched
from lit_cka.functional.centring import standardized
from lit_cka.functional.procrustes import orthogonal_alignment
from lit_cka.functional.signatures import component_label_correlation, kernel_pca, signature_gram
from lit_cka.functional.units import in_usual_unit


@dataclass(frozen=True)
class LayerPoint:
    """A layer of a model on a dataset, and its place."""

    model: str
    dataset: str
    layer: str
    depth: int
    position: tuple[float, float, float]


@dataclass(frozen=True)
class Pairing:
    """How far apart a model's layers lie on two datasets that say the same.

    Attributes:
        layers: in order.
        cka: of each layer on the one dataset with itself on the other.
        distances: in the map.
        residual: sum of squared distances that is left when the one cloud of points is rotated onto the other.
        relative_residual: the same, as a share of the other cloud's spread. Both are NaN for one layer.
    """

    model: str
    datasets: tuple[str, str]
    layers: list[str]
    cka: list[float]
    distances: list[float]
    residual: float
    relative_residual: float


@dataclass(frozen=True)
class Projection:
    """Layers as points of one map, and what it tells of models and datasets.

    Attributes:
        points: in the order of the rows of `cka`.
        cka: (points, points), linear CKA of all pairs.
        explained: share of the variance of each of the three components.
        correlation: by what points are told apart by ("dataset", "model"), correlation of each component with it;
            NaN where there is only one.
        correlation_by_model: the same with the dataset, within each model.
        pairings: of every model and pair of datasets, by the layers that both have.
    """

    points: list[LayerPoint]
    cka: NDArray[np.float64]
    explained: list[float]
    correlation: dict[str, list[float]]
    correlation_by_model: dict[str, list[float]]
    pairings: list[Pairing]


def project(features: Sequence[Features], *, standardize: bool = False) -> Projection:
    """Returns the joint kernel PCA of the signatures of all layers; see `lit_cka.functional.signatures`.

    Args:
        features: one for each model and dataset. Their samples say the same in the same order, such as one text in two
            languages: ids have to agree.
        standardize: give every feature unit variance first, as published maps do. Linear CKA then is of standardised
            features.

    Raises:
        ValueError: if there are none, a model and dataset come twice, or samples don't match.
    """
    if not features:
        raise ValueError("Expected features of at least one model, but got none.")
    keys = [(each.model, each.data) for each in features]
    if len(set(keys)) < len(keys):
        raise ValueError(f"Expected every model and dataset once, but got {keys}.")
    features = [features[0], *(matched(features[0], each) for each in features[1:])]
    layers = [standardized(in_usual_unit(X)) if standardize else X for each in features for X in each.layers.values()]
    gram = signature_gram(layers)
    coordinates, explained = kernel_pca(gram)
    points = [
        LayerPoint(each.model, each.data, layer, depth, (0.0, 0.0, 0.0))
        for each in features
        for depth, layer in enumerate(each.layers)
    ]
    points = [
        LayerPoint(point.model, point.dataset, point.layer, point.depth, (place[0], place[1], place[2]))
        for point, place in zip(points, coordinates.tolist(), strict=True)
    ]
    models = list(dict.fromkeys(point.model for point in points))
    by = {"dataset": [point.dataset for point in points], "model": [point.model for point in points]}
    within = {
        model: _correlation(
            coordinates[[index for index, point in enumerate(points) if point.model == model]],
            [point.dataset for point in points if point.model == model],
        )
        for model in models
    }
    return Projection(
        points,
        gram.numpy(),
        explained.tolist(),
        {name: _correlation(coordinates, labels) for name, labels in by.items()},
        within,
        _pairings(features, points, coordinates, gram),
    )


def _correlation(coordinates: Tensor, labels: Sequence[str]) -> list[float]:
    defined = ~coordinates.isnan().any(dim=1)
    if len({label for label, keep in zip(labels, defined.tolist(), strict=True) if keep}) < 2:
        return [float("nan")] * coordinates.shape[1]  # one model, or one dataset: nothing to tell apart
    return component_label_correlation(coordinates, labels).tolist()


def _pairings(
    features: Sequence[Features], points: Sequence[LayerPoint], coordinates: Tensor, gram: Tensor
) -> list[Pairing]:
    pairings = []
    place = {(point.model, point.dataset, point.layer): index for index, point in enumerate(points)}
    for a, b in combinations(features, 2):
        if a.model != b.model:
            continue
        shared = [layer for layer in a.layers if layer in b.layers]
        if not shared:
            continue
        one = [place[a.model, a.data, layer] for layer in shared]
        other = [place[b.model, b.data, layer] for layer in shared]
        residual, relative = _residual(coordinates[one], coordinates[other])
        pairings.append(
            Pairing(
                a.model,
                (a.data, b.data),
                shared,
                gram[one, other].tolist(),
                (coordinates[one] - coordinates[other]).norm(dim=1).tolist(),
                residual,
                relative,
            )
        )
    return pairings


def _residual(one: Tensor, other: Tensor) -> tuple[float, float]:
    if len(one) < 2:
        return float("nan"), float("nan")  # a single point says nothing of the shape of a cloud
    aligned = orthogonal_alignment(one, other)
    return float(aligned.residual), float(aligned.relative)
