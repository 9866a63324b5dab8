"""`project` against linear CKA, classical scaling and SciPy's Procrustes."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from lit_cka.analysis.features import Features
from lit_cka.analysis.projection import Procrustes, Projection, project
from tests import oracles


def features(model: str, data: str, widths: list[int], n: int = 20) -> Features:
    """Off-centre; layers of one dataset, and of one depth, are related."""
    rng = np.random.default_rng([ord(letter) for letter in model + data])
    shared = np.random.default_rng([ord(letter) for letter in data]).standard_normal((n, 4))
    layers = {}
    for index, width in enumerate(widths):
        same = np.random.default_rng(index).standard_normal((n, 4))
        X = (shared + 2 * same) @ rng.standard_normal((4, width)) + rng.standard_normal((n, width))
        layers[f"layers.{index}"] = torch.from_numpy(X * rng.gamma(1.0, size=width) + 30 * rng.standard_normal(width))
    return Features(layers, [f"p{index}" for index in range(n)], model, data)


SETS = [features("small", data, [6, 30, 5]) for data in ("en", "hi")] + [
    features("large", data, [9, 7, 8, 40]) for data in ("en", "hi")
]


def places(projection: Projection) -> np.ndarray:
    return np.array([point.position for point in projection.points])


@pytest.mark.parametrize("debiased", [None, True, False])
def test_the_rows_are_the_layers_with_their_cka(debiased: bool | None) -> None:
    found = project(SETS) if debiased is None else project(SETS, debiased=debiased)
    named = [(each.model, each.data, layer, depth) for each in SETS for depth, layer in enumerate(each.layers)]
    assert [(point.model, point.dataset, point.layer, point.depth) for point in found.points] == named
    layers = [X for each in SETS for X in each.layers.values()]
    oracle = [[oracles.linear_cka(X, Y, debiased=debiased is not False) for Y in layers] for X in layers]
    np.testing.assert_allclose(found.cka, oracle, atol=1e-10)


def test_coordinates_are_those_of_classical_scaling() -> None:
    found = project(SETS)
    m = len(found.cka)
    H = np.eye(m) - 1 / m
    values = np.linalg.eigvalsh(H @ found.cka @ H)[::-1]
    np.testing.assert_allclose(found.explained, values[:3] / values.sum(), atol=1e-10)
    assert list(found.explained) == sorted(found.explained, reverse=True)
    np.testing.assert_allclose(np.sum(places(found) ** 2, axis=0), values[:3], atol=1e-10)
    # The map's squared distances are at most the whole ones, 2 - 2 CKA, and sum to the share that is explained.
    whole = 2 - 2 * found.cka
    shown = np.sum((places(found)[:, None] - places(found)[None]) ** 2, axis=-1)
    assert (shown <= whole + 1e-9).all()
    assert shown.sum() / whole.sum() == pytest.approx(sum(found.explained))


def test_three_dimensions_show_four_points_without_loss() -> None:
    found = project([features("small", data, [6, 30]) for data in ("en", "hi")])
    shown = np.linalg.norm(places(found)[:, None] - places(found)[None], axis=-1)
    np.testing.assert_allclose(shown, np.sqrt((2 - 2 * found.cka).clip(0)), atol=1e-7)
    assert sum(found.explained) == pytest.approx(1)


def test_standardized() -> None:
    scaled = [
        replace(each, layers={layer: X * torch.logspace(-2, 2, X.shape[1]) + 3 for layer, X in each.layers.items()})
        for each in SETS
    ]
    found = project(scaled, standardize=True)
    np.testing.assert_allclose(found.cka, project(SETS, standardize=True).cka, atol=1e-9)
    layers = [X / X.std(0) for each in SETS for X in each.layers.values()]
    oracle = [[oracles.linear_cka(X, Y, debiased=True) for Y in layers] for X in layers]
    np.testing.assert_allclose(found.cka, oracle, atol=1e-9)
    assert np.abs(found.cka - project(SETS).cka).max() > 0.01


def test_standardized_constant_features_do_not_count() -> None:
    constant = torch.full((20, 2), 0.1, dtype=torch.float64) * 3
    more = [replace(each, layers={k: torch.cat([X, constant], 1) for k, X in each.layers.items()}) for each in SETS]
    np.testing.assert_allclose(project(more, standardize=True).cka, project(SETS, standardize=True).cka, atol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 0.5, -2.0])
def test_standardized_dead_features_do_not_count(mean: float) -> None:
    """One that varies by 6e-33 beside others of 1: rounding, which unit variance would make as loud as these."""
    torch.manual_seed(0)
    dead = mean * 1e-16 + 6e-33 * torch.randn(20, 2, dtype=torch.float64)
    more = [replace(each, layers={k: torch.cat([X, dead], 1) for k, X in each.layers.items()}) for each in SETS]
    np.testing.assert_allclose(project(more, standardize=True).cka, project(SETS, standardize=True).cka, atol=1e-10)
    small = [replace(each, layers={k: X * 1e-120 for k, X in each.layers.items()}) for each in SETS]
    np.testing.assert_allclose(project(small, standardize=True).cka, project(SETS, standardize=True).cka, atol=1e-10)


def correlation(x: np.ndarray, labels: list[str]) -> float:
    """Of a component with a label of two values."""
    return abs(float(np.corrcoef(x, np.array(labels) == labels[0])[0, 1]))


def test_correlations_with_the_labels() -> None:
    found = project(SETS)
    X = places(found)
    for name in ("dataset", "model"):
        labels = [getattr(point, name) for point in found.points]
        np.testing.assert_allclose(found.correlation[name], [correlation(x, labels) for x in X.T], atol=1e-8)
    assert list(found.correlation_by_model) == ["small", "large"]
    for model, values in found.correlation_by_model.items():
        rows = [index for index, point in enumerate(found.points) if point.model == model]
        labels = [found.points[index].dataset for index in rows]
        np.testing.assert_allclose(values, [correlation(x, labels) for x in X[rows].T], atol=1e-8)


def check_procrustes(found: Procrustes, A: np.ndarray, B: np.ndarray) -> None:
    """Against SciPy's rotation of the points as they are."""
    R, _ = orthogonal_procrustes(A, B)
    residual, joint = np.linalg.norm(A @ R - B), np.sum(A**2) + np.sum(B**2)
    assert found.residual == pytest.approx(residual, abs=1e-7)
    assert found.squared_residual == pytest.approx(residual**2, abs=1e-7)
    assert found.relative_residual == pytest.approx(residual / joint**0.5, abs=1e-7)
    assert found.relative_squared_residual == pytest.approx(residual**2 / joint, abs=1e-7)
    assert 1e-4 < found.relative_squared_residual < 1


def signatures(each: Features, debiased: bool) -> np.ndarray:
    """Whole n x n matrices, centred and of unit norm, written out; those without a bias with a diagonal of zeros."""
    rows = []
    for X in each.layers.values():
        K = oracles.linear_gram(X.numpy())
        n = len(K)
        if debiased:
            np.fill_diagonal(K, 0)
            sums = K.sum(0)
            K = K - sums / (n - 2) - sums[:, None] / (n - 2) + K.sum() / ((n - 1) * (n - 2))
            np.fill_diagonal(K, 0)
        rows.append(K.ravel() / np.linalg.norm(K))
    return np.array(rows)


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_pairs(debiased: bool, centre: bool) -> None:
    found = project(SETS, debiased=debiased, centre=centre)
    assert [(pairing.model, pairing.datasets) for pairing in found.pairings] == [
        ("small", ("en", "hi")), ("large", ("en", "hi")),
    ]  # fmt: skip
    X = places(found)
    for pairing, (a, b) in zip(found.pairings, (SETS[:2], SETS[2:]), strict=True):
        assert pairing.layers == list(a.layers)
        cka = [oracles.linear_cka(a.layers[layer], b.layers[layer], debiased) for layer in a.layers]
        np.testing.assert_allclose(pairing.cka, cka, atol=1e-10)
        one, other = (
            X[[i for i, point in enumerate(found.points) if (point.model, point.dataset) == (each.model, each.data)]]
            for each in (a, b)
        )
        np.testing.assert_allclose(pairing.distances, np.linalg.norm(one - other, axis=1), atol=1e-10)
        clouds = (one, other), (signatures(a, debiased), signatures(b, debiased))
        for residuals, pair in zip((pairing.procrustes_in_map, pairing.procrustes_of_signatures), clouds, strict=True):
            A, B = (points - points.mean(0) if centre else points for points in pair)
            check_procrustes(residuals, A, B)


def test_a_map_without_a_centre_is_the_published_one() -> None:
    """Eigenvectors of the signatures' products, as they are; what the first component was is the second."""
    found = project(SETS, debiased=False, centre=False)
    V = np.concatenate([signatures(each, debiased=False) for each in SETS])
    values, vectors = np.linalg.eigh(V @ V.T)
    expected = vectors[:, ::-1][:, :3] * np.sqrt(values[::-1][:3])
    np.testing.assert_allclose(np.abs(places(found)), np.abs(expected), atol=1e-7)
    np.testing.assert_allclose(found.explained, values[::-1][:3] / len(V), atol=1e-10)
    assert (places(found)[:, 0] > 0).all()
    centred = project(SETS, debiased=False)
    assert abs(np.corrcoef(places(found)[:, 1], places(centred)[:, 0])[0, 1]) > 0.9


def test_few_samples_of_unrelated_layers_are_not_alike() -> None:
    """Wide features of 12 samples: near 1 by the plain estimator, near 0 by the debiased one, which is the default."""
    rng = np.random.default_rng(0)
    noise = [
        Features({"0": torch.from_numpy(rng.standard_normal((12, 400)))}, [str(i) for i in range(12)], name, "data")
        for name in ("a", "b")
    ]
    assert project(noise, debiased=False).cka[0, 1] > 0.9
    assert abs(project(noise).cka[0, 1]) < 0.3


def test_three_datasets_make_three_pairs() -> None:
    found = project([features("small", data, [6, 5]) for data in ("en", "hi", "fr")])
    assert [pairing.datasets for pairing in found.pairings] == list(combinations(("en", "hi", "fr"), 2))


@pytest.mark.parametrize(
    ("sets", "by_dataset", "by_model", "num_pairings"),
    [(SETS[:1], False, False, 0), (SETS[:2], True, False, 1), (SETS[::2], False, True, 0)],
)
def test_one_model_or_one_dataset(sets: list[Features], by_dataset: bool, by_model: bool, num_pairings: int) -> None:
    found = project(sets)
    assert np.isfinite(found.correlation["dataset"]).all() == by_dataset
    assert np.isfinite(found.correlation["model"]).all() == by_model
    assert all(np.isfinite(values).all() == by_dataset for values in found.correlation_by_model.values())
    assert len(found.pairings) == num_pairings


def test_one_layer_in_common_has_no_shape() -> None:
    found = project([features("small", "en", [6]), features("small", "hi", [6])])
    assert len(found.pairings[0].distances) == 1
    for residuals in (found.pairings[0].procrustes_in_map, found.pairings[0].procrustes_of_signatures):
        assert np.isnan(list(asdict(residuals).values())).all()
    renamed = replace(SETS[1], layers={f"other.{name}": X for name, X in SETS[1].layers.items()})
    assert project([SETS[0], renamed]).pairings == []


def test_a_constant_layer_has_no_place() -> None:
    dead = replace(SETS[0], layers={**SETS[0].layers, "layers.1": torch.full((20, 3), 0.1, dtype=torch.float64)})
    found = project([dead, SETS[1]])
    assert np.isnan(found.points[1].position).all()
    assert np.isnan(found.cka[1]).all()
    others = [index for index in range(6) if index != 1]
    assert np.isfinite(places(found)[others]).all()
    assert np.isfinite(found.correlation["dataset"]).all()


def test_what_can_not_be_projected() -> None:
    with pytest.raises(ValueError, match="at least one model, but got none"):
        project([])
    with pytest.raises(ValueError, match=r"every model and dataset once, but got .*'small', 'en'"):
        project([SETS[0], SETS[0]])
    with pytest.raises(ValueError, match="sample 0 is 'p0' for small and 'x' for small"):
        project([SETS[0], replace(SETS[1], ids=["x", *SETS[1].ids[1:]])])
    with pytest.raises(ValueError, match="small has 20 and other 19"):
        project([SETS[0], features("other", "hi", [4], n=19)])
    with pytest.raises(ValueError, match="at least 4 samples for the debiased estimator, but got 3"):
        project([features("small", "en", [4], n=3)])
    with pytest.raises(ValueError, match="at least 2 samples"):
        project([features("small", "en", [4], n=1)], debiased=False)
