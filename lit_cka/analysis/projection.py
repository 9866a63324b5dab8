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
class Procrustes:
    """What is left when a model's layers on one dataset, `A`, are rotated onto those on another, `B`, as one cloud.

    Attributes:
        squared_residual: `||A R - B||_F^2`, R orthogonal and as good as can be.
        residual: `||A R - B||_F`.
        relative_squared_residual: `||A R - B||_F^2 / (||A||_F^2 + ||B||_F^2)`, in [0, 1].
        relative_residual: its root, in [0, 1]: relative to the joint norm.
    """

    squared_residual: float
    residual: float
    relative_squared_residual: float
    relative_residual: float


@dataclass(frozen=True)
class Pairing:
    """How far apart a model's layers lie on two datasets of the same samples.

    Attributes:
        layers: in order.
        cka: of each layer on the one dataset with itself on the other.
        distances: in the map.
        procrustes_in_map: of the three coordinates of the map.
        procrustes_of_signatures: of the whole signatures, of which the map shows three directions. Both are NaN for one
            layer, and where one is undefined.
    """

    model: str
    datasets: tuple[str, str]
    layers: list[str]
    cka: list[float]
    distances: list[float]
    procrustes_in_map: Procrustes
    procrustes_of_signatures: Procrustes


@dataclass(frozen=True)
class Projection:
    """Layers as points of one map, and what it tells of models and datasets.

    Attributes:
        points: in the order of the rows of `cka`.
        cka: (points, points), linear CKA of all pairs.
        explained: share of the variance of each of the three components; about the origin, if not centred.
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


def project(
    features: Sequence[Features], *, standardize: bool = False, debiased: bool = True, centre: bool = True
) -> Projection:
    """Returns the joint kernel PCA of the signatures of all layers; see `lit_cka.functional.signatures`.

    Args:
        features: one for each model and dataset. Their samples are the same in the same order, such as one text in two
            languages: ids have to agree.
        standardize: give every feature unit variance first, as published maps do. Linear CKA then is of standardised
            features.
        debiased: use the unbiased HSIC in CKA: signatures are U-centred Gram matrices. The plain one is near 1 for few
            samples of wide features, whatever they are (Murphy et al. 2024, arXiv 2405.01012).
        centre: measure the signatures from their mean in the map, and those of each dataset from theirs before they are
            rotated. False leaves them where they are, as published maps do: the first component then says little else
            than that all are alike, and the second is what the first would have been.

    Raises:
        ValueError: if there are none, a model and dataset come twice, samples don't match, or there are fewer than 4 (2
            for the plain CKA).

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).double()
        >>> ids = [str(number) for number in range(30)]
        >>> before, after = (Features({"blocks.0": Z}, ids, model=name) for Z, name in ((X, "a"), (X + Y, "b")))
        >>> projection = project([before, after])
        >>> [(point.model, point.layer) for point in projection.points], projection.cka.shape
        ([('a', 'blocks.0'), ('b', 'blocks.0')], (2, 2))
    """
    if not features:
        raise ValueError("Expected features of at least one model, but got none.")
    keys = [(each.model, each.data) for each in features]
    if len(set(keys)) < len(keys):
        raise ValueError(f"Expected every model and dataset once, but got {keys}.")
    features = [features[0], *(matched(features[0], each) for each in features[1:])]
    layers = [standardized(in_usual_unit(X)) if standardize else X for each in features for X in each.layers.values()]
    gram = signature_gram(layers, debiased=debiased)
    coordinates, explained = kernel_pca(gram, centre=centre)
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
        _pairings(features, points, coordinates, gram, centre),
    )


def _correlation(coordinates: Tensor, labels: Sequence[str]) -> list[float]:
    defined = ~coordinates.isnan().any(dim=1)
    if len({label for label, keep in zip(labels, defined.tolist(), strict=True) if keep}) < 2:
        return [float("nan")] * coordinates.shape[1]  # one model, or one dataset: nothing to tell apart
    return component_label_correlation(coordinates, labels).tolist()


def _pairings(
    features: Sequence[Features], points: Sequence[LayerPoint], coordinates: Tensor, gram: Tensor, centre: bool
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
        cloud, other_cloud = (_cloud(gram[rows][:, rows]) for rows in (one, other))
        pairings.append(
            Pairing(
                a.model,
                (a.data, b.data),
                shared,
                gram[one, other].tolist(),
                (coordinates[one] - coordinates[other]).norm(dim=1).tolist(),
                _procrustes(coordinates[one], coordinates[other], centre),
                _procrustes(cloud, other_cloud, centre),
            )
        )
    return pairings


def _cloud(K: Tensor) -> Tensor:
    """Returns points (k, k) with the inner products `K` (k, k): signatures, but for a rotation.

    Procrustes undoes it: `||A' B||_*` is that of the roots `K^(1/2)` of `A A'` and of `B B'`.
    """
    coordinates, _ = kernel_pca(K, len(K), centre=False)
    return coordinates


def _procrustes(one: Tensor, other: Tensor, centre: bool) -> Procrustes:
    if len(one) < 2:
        return Procrustes(*[float("nan")] * 4)  # a single point says nothing of the shape of a cloud
    _, *residuals = orthogonal_alignment(one, other, centre=centre)
    return Procrustes(*map(float, residuals))
