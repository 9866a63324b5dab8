"""How far weights moved, and whether the same way, against NumPy in float64 on weights far off zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import update_size
from lit_cka.functional.update_size import num_not_finite, update_products


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A base far off zero, and two updates of it that have something in common."""
    generator = torch.Generator().manual_seed(0)
    W0, shared, *others = (torch.randn(shape, generator=generator) for _ in range(4))
    W0 = W0 + 10
    first, second = (W0 + 0.1 * shared + 0.2 * other for other in others)
    return W0.to(dtype), first.to(dtype), second.to(dtype)


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (4, 3, 2, 2), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 2**19])
def test_products(shape: tuple[int, ...], dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_size, "_CHUNK", size)
    W0, *updated = weights(shape, dtype)
    found = update_products(W0, updated)
    w0, *others = (W.to(torch.float64).numpy().ravel() for W in (W0, *updated))
    deltas = np.array([other - w0 for other in others])
    np.testing.assert_allclose(found.products, deltas @ deltas.T, rtol=1e-12)
    assert found.base == pytest.approx(w0 @ w0, rel=1e-12)
    if W0.numel():
        norms = np.linalg.norm(deltas, axis=1)
        assert found.relative_change(1) == pytest.approx(norms[1] / np.linalg.norm(w0), rel=1e-12)
        assert found.cosine() == pytest.approx(deltas[0] @ deltas[1] / norms.prod(), rel=1e-12)


def test_numpy_arrays_and_other_dtypes() -> None:
    W0, W1, _ = weights((5, 9))
    half = W1.half()
    found = update_products(W0.numpy(), [W1.numpy(), half.numpy()])  # type: ignore[arg-type, list-item]
    assert torch.equal(found.products, update_products(W0, [W1, half]).products)
    assert found.products[1, 1] == pytest.approx((half.double() - W0.double()).square().sum().item(), rel=1e-12)


def test_nothing_changed_and_a_base_of_zeros() -> None:
    W0, W1, _ = weights((5, 9))
    found = update_products(W0, [W0, W1])
    assert found.relative_change(0) == 0
    assert math.isnan(found.cosine())
    zeros = torch.zeros(3)
    assert update_products(zeros, [zeros]).relative_change() == 0
    assert update_products(zeros, [zeros + 1]).relative_change() == math.inf


def test_directions() -> None:
    """The cosine knows neither the base nor the length of an update, and stays in its range."""
    W0, W1, W2 = weights((50, 9), torch.float64)
    moved = update_products(W0 + 100, [W1 + 100, W0 + 100 + 7 * (W2 - W0)]).cosine()
    assert moved == pytest.approx(update_products(W0, [W1, W2]).cosine(), rel=1e-9)
    assert update_products(W0, [W1, W0 + 3 * (W1 - W0)]).cosine() == pytest.approx(1)
    assert update_products(W0, [W1, 2 * W0 - W1]).cosine() == pytest.approx(-1)
    for seed in range(20):
        same = torch.randn(33, generator=torch.Generator().manual_seed(seed))
        assert update_products(torch.zeros(33), [same, same]).cosine() <= 1


def test_what_is_not_finite() -> None:
    W0, W1, W2 = weights((5, 9))
    W1[0, 0], W1[3, 3], W2[1, 1] = math.nan, math.inf, -math.inf
    assert [num_not_finite(W) for W in (W0, W1, W2)] == [0, 2, 1]
    found = update_products(W0, [W1, W0])
    assert math.isnan(found.relative_change(0))
    assert found.products[1, 1] == 0


@pytest.mark.parametrize("W1", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.int64)])
def test_other_weights(W1: Tensor) -> None:
    with pytest.raises(ValueError, match=r"of the same shape, but got torch\.float32"):
        update_products(torch.ones(2, 3), [W1])
