"""What keeping features in a smaller type would change a score by: an estimate, against scores of rounded features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_cka.reference.feature_store import FeatureStore
from lit_cka.reference.rounding import RoundingEstimate, rounding_cost
from tests import oracles

CPU = torch.device("cpu")


def features(n: int = 200, d: int = 12, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 50 + spread * torch.randn(n, d, dtype=torch.float64, generator=generator)


def store_of(X: Tensor, batches: int = 5) -> FeatureStore:
    store = FeatureStore(torch.float64)
    for block in X.chunk(batches):
        store.add(block)
    return store


def rounded(X: Tensor, dtype: torch.dtype) -> Tensor:
    """About the mean of the first rows, as they are kept."""
    pivot = X[: len(X) // 5].mean(0)
    return (X - pivot).to(dtype).double() + pivot


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_estimate_is_not_far_below_what_a_related_layer_loses(dtype: torch.dtype, seed: int) -> None:
    X = features(seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    live = X @ torch.randn(12, 8, dtype=torch.float64, generator=generator)
    live = live + live.std() * torch.randn(live.shape, dtype=torch.float64, generator=generator)
    lost = abs(oracles.linear_cka(live, rounded(X, dtype), False) - oracles.linear_cka(live, X, False))
    cost = rounding_cost([store_of(X)], dtype, CPU)
    assert lost / 3 < cost < 1e-3


def test_smaller_types_cost_more() -> None:
    store = store_of(features())
    costs = [rounding_cost([store], dtype, CPU) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert costs[0] < 1e-8 < costs[1] < costs[2] < 1e-3
    assert rounding_cost([store], torch.float64, CPU) == 0


def test_the_worst_layer_counts() -> None:
    stores = [store_of(features(n, d, seed=d)) for n, d in ((400, 64), (20, 2), (200, 12))]
    costs = [rounding_cost([store], torch.bfloat16, CPU) for store in stores]
    assert costs[1] > 2 * max(costs[0], costs[2])
    assert rounding_cost(stores, torch.bfloat16, CPU) == costs[1]


def test_features_that_only_rounding_makes_constant_cost_everything() -> None:
    X = torch.ones(50, 3, dtype=torch.float64)
    X[0] = 1e6
    X[1:] += 1e-3 * torch.randn(49, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = RoundingEstimate()
    estimate.add(X[1:], torch.ones(49, 3, dtype=torch.float64))
    assert estimate.cost(CPU) == torch.inf


def test_no_features_cost_nothing() -> None:
    assert rounding_cost([], torch.bfloat16, CPU) == 0
    assert rounding_cost([FeatureStore()], torch.bfloat16, CPU) == 0
    assert rounding_cost([store_of(torch.full((20, 3), 7.0, dtype=torch.float64))], torch.bfloat16, CPU) == 0
