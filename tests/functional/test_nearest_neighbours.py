"""Mutual nearest neighbours and CKNNA against scikit-learn and loops, tiles against the whole, and ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lit_cka.functional import cknna, mutual_knn
from lit_cka.functional import nearest_neighbours as module
from lit_cka.functional.cknna import cknna_weights
from lit_cka.functional.mutual_knn import mutual_knn_weights
from lit_cka.functional.nearest_neighbours import nearest_neighbours, neighbour_products
from tests.functional.test_cka import rotation
from tests.oracles import float64, paired_features

MEASURES = pytest.mark.parametrize("measure", [mutual_knn, cknna])
SHAPES = pytest.mark.parametrize(
    ("n", "d_x", "d_y", "k"), [(60, 6, 3, 10), (25, 40, 30, 3), (12, 5, 4, 11), (9, 2, 7, 1)]
)


def neighbour_sets(X: Tensor, k: int) -> list[set[int]]:
    found = NearestNeighbors(n_neighbors=k, metric="cosine").fit(float64(X)).kneighbors(return_distance=False)
    return [set(row.tolist()) for row in found]


def mutual_knn_oracle(X: Tensor, Y: Tensor, k: int) -> float:
    return float(np.mean([len(a & b) / k for a, b in zip(neighbour_sets(X, k), neighbour_sets(Y, k), strict=True)]))


def cknna_oracle(X: Tensor, Y: Tensor, k: int) -> float:
    """The paper's sums, pair by pair."""
    sides = []
    for features in (X, Y):
        x = float64(features)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        K = x @ x.T
        sides.append((K - K.mean(axis=1, keepdims=True), neighbour_sets(features, k)))

    def align(one: Any, other: Any) -> float:
        (K, near_k), (L, near_l) = one, other
        return sum(K[i, j] * L[i, j] for i in range(len(K)) for j in near_k[i] & near_l[i])

    return float(align(*sides) / np.sqrt(align(sides[0], sides[0]) * align(sides[1], sides[1])))


ORACLES = {mutual_knn: mutual_knn_oracle, cknna: cknna_oracle}


@MEASURES
@SHAPES
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
@pytest.mark.parametrize(("offset", "dtype"), [(3.0, torch.float64), (3.0, torch.bfloat16), (30.0, torch.float32)])
def test_equals_the_oracle(
    measure: Any, n: int, d_x: int, d_y: int, k: int, related: bool, offset: float, dtype: torch.dtype
) -> None:
    X, Y = paired_features(n, d_x, d_y, related=related, offset=offset, dtype=dtype)
    value = measure(X, Y, k=k)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(ORACLES[measure](X, Y, k), abs=1e-9)


@MEASURES
def test_tiles_are_the_whole(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = paired_features(50, 6, 9)
    X[20:24] = X[3]  # ties across tiles
    whole = measure(X, Y, k=7)
    for tile in (1, 7, 49, 50, 1000):
        torch.testing.assert_close(measure(X, Y, k=7, tile=tile), whole, rtol=0, atol=1e-14)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 120)
    torch.testing.assert_close(measure(X, Y, k=7), whole, rtol=0, atol=1e-14)


def test_no_more_than_a_tile_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 400
    X, Y = paired_features(n, 5, 5)
    largest = 0

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(module, "_TILE_ELEMENTS", 10 * n)
    with Watching():
        cknna(X, Y, k=10)
    assert largest == 10 * n  # of n^2 = 40 of these


@MEASURES
def test_invariances(measure: Any) -> None:
    X, Y = paired_features(40, 6, 8)
    expected = measure(X, Y, k=5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for x, y in (
        (Y, X), (X @ rotation(6), Y), (X * 1e-75, Y * 1e75), (X * torch.linspace(0.5, 9, 40)[:, None].double(), Y),
        (X[order], Y[order]),
    ):  # fmt: skip
        torch.testing.assert_close(measure(x, y, k=5), expected, rtol=0, atol=1e-9)
    assert measure(X, X, k=5).item() == pytest.approx(1, abs=1e-12)
    assert 0 < expected < 1


def test_unrelated_features_share_what_chance_gives() -> None:
    values = [mutual_knn(*paired_features(60, 40, 3, related=False, offset=0, seed=seed), k=6) for seed in range(40)]
    assert torch.stack(values).mean().item() == pytest.approx(6 / 59, abs=0.01)


@MEASURES
def test_features_far_from_zero_keep_their_neighbours(measure: Any) -> None:
    """Cosines are all next to 1 there: products of the rows themselves would be rounding."""
    X, Y = paired_features(40, 6, 8, offset=0)
    far = X.double() + 1e6 * torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = np.array(far.numpy(), dtype=np.longdouble)
    exact /= np.sqrt((exact**2).sum(1, keepdims=True))
    exact -= exact.mean(0)
    distances = ((exact[:, None] - exact) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(np.argsort(distances, axis=1)[:, :5], axis=1)
    found = nearest_neighbours(far, 5)
    assert found.indices.shape == (40, 5)
    np.testing.assert_array_equal(found.indices.sort(dim=1).values, expected)
    assert 0 < measure(far, Y, k=5) < 1


def test_all_that_are_as_near_as_the_last_are_neighbours() -> None:
    """Four samples are repeated: a choice among them would go by their order, in both sets of features."""
    X, Y = paired_features(30, 4, 5, related=False)
    X[10:15] = X[10]
    Y[10:15] = Y[10]
    found = nearest_neighbours(X, 2)
    near = [set(row[there > 0].tolist()) for row, there in zip(found.indices, found.present, strict=True)]
    for sample in range(10, 15):
        assert near[sample] == set(range(10, 15)) - {sample}
    others = nearest_neighbours(Y, 2)
    sets = [set(row[there > 0].tolist()) for row, there in zip(others.indices, others.present, strict=True)]
    expected = np.mean([len(a & b) / np.sqrt(len(a) * len(b)) for a, b in zip(near, sets, strict=True)])
    assert mutual_knn(X, Y, k=2).item() == pytest.approx(expected, abs=1e-12)
    assert [mutual_knn(X, X, k=2).item(), cknna(X, X, k=2).item()] == pytest.approx([1, 1], abs=1e-12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mutual_knn(X[order], Y[order], k=2), mutual_knn(X, Y, k=2), rtol=0, atol=1e-12)


@MEASURES
def test_undefined(measure: Any) -> None:
    X, Y = paired_features(20, 4, 5)
    zero = X.clone()
    zero[3] = 0
    bad = X.clone()
    bad[3, 1] = torch.nan
    for x in (torch.ones_like(X) * 0.1, zero, bad, bad.nan_to_num(torch.inf), torch.zeros_like(X)):
        assert measure(x, Y, k=3).isnan()
        assert measure(Y, x, k=3).isnan()


@MEASURES
def test_wrong_input_is_an_error(measure: Any) -> None:
    X, Y = paired_features(10, 4, 5)
    with pytest.raises(ValueError, match="`k` to be at most n - 1 = 9, the number of other samples, but got 10"):
        measure(X, Y, k=10)
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        measure(X, Y, k=0)
    with pytest.raises(ValueError, match="at least 2 samples, but got 1"):
        measure(X[:1], Y[:1], k=1)
    with pytest.raises(ValueError, match="same samples"):
        measure(X[:9], Y, k=1)
    with pytest.raises(ValueError, match="floating point"):
        measure(X.long(), Y, k=1)


@pytest.mark.parametrize("weights", [mutual_knn_weights, cknna_weights])
def test_products_of_permuted_samples(weights: Any) -> None:
    n, k = 30, 4
    Xs, Ys = zip(*(paired_features(n, 4, 5, seed=seed) for seed in range(3)), strict=True)
    Ys[1][5:9] = Ys[1][5]  # wider rows than the others
    orders = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    As, Bs = ([weights(features, k) for features in side] for side in (Xs, Ys[:2]))
    products = neighbour_products(As, Bs, orders)
    assert products.shape == (4, 3, 2)
    measure = mutual_knn if weights is mutual_knn_weights else cknna
    for t, order in enumerate(orders):
        for i, X in enumerate(Xs):
            for j, Y in enumerate(Ys[:2]):
                assert products[t, i, j].item() == pytest.approx(measure(X, Y[order], k=k).item(), abs=1e-12)
    torch.testing.assert_close(neighbour_products(As, Bs, orders, tile=7), products, rtol=0, atol=1e-14)
