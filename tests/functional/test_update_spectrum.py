"""The spectrum of an update against a full SVD in NumPy, on weights far off zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional.update_spectrum import effective_rank, stable_rank, update_singular_values

SHAPES = pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 2, 3, 3), (1, 7), (7, 1), (20, 20)])


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W0 = 10 + torch.randn(shape, generator=generator)
    return W0.to(dtype), (W0 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)


def singular_values(W0: Tensor, W1: Tensor) -> np.ndarray:
    delta = W1.to(torch.float64) - W0.to(torch.float64)
    return np.linalg.svd(delta.reshape(len(delta), -1).numpy(), compute_uv=False)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_it_is_that_of_the_update(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    W0, W1 = weights(shape, dtype)
    expected = singular_values(W0, W1)
    found = update_singular_values(W0, W1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    p = expected / expected.sum()
    assert effective_rank(found) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    frobenius, spectral = np.linalg.norm(expected), expected[0]
    assert stable_rank(found) == pytest.approx((frobenius / spectral) ** 2, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_update_of_low_rank_has_that_many(rank: int) -> None:
    """As merged LoRA has; rounding in the Gram matrix adds no directions."""
    generator = torch.Generator().manual_seed(1)
    W0, B, A = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 60), (40, rank), (rank, 60))
    )
    W0 = torch.round(W0 * 1024)  # so that adding is exact
    W1 = W0 + torch.round(B * 1024) @ torch.round(A * 1024)
    found = update_singular_values(W0, W1)
    assert int((found > 0).sum()) == rank
    np.testing.assert_allclose(found[:rank], singular_values(W0, W1)[:rank], rtol=1e-10)
    assert 1 <= effective_rank(found) <= rank + 1e-9


def test_small_singular_values() -> None:
    """Right down to a millionth of the largest, and 0 where a Gram matrix can't tell."""
    s = torch.logspace(0, -12, 25, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(25, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    found = update_singular_values(torch.zeros(25, 25, dtype=torch.float64), Q * s)
    kept = s > 1e-6
    np.testing.assert_allclose(found[kept], s[kept], rtol=1e-3)
    assert not found[s < 1e-8].any()
    p = (s / s.sum()).numpy()
    assert effective_rank(found) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_ranks_know_no_scale_and_no_rotation() -> None:
    W0, W1 = weights((12, 30), torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    one, other = update_singular_values(W0, W1), update_singular_values(1e-5 * Q @ W0, 1e-5 * Q @ W1)
    assert effective_rank(other) == pytest.approx(effective_rank(one), rel=1e-9)
    assert stable_rank(other) == pytest.approx(stable_rank(one), rel=1e-9)
    equal = torch.full((8,), 3.0)
    assert (effective_rank(equal), stable_rank(equal)) == (pytest.approx(8), pytest.approx(8))
    assert effective_rank(np.array([5.0, 0.0])) == stable_rank(np.array([0.0, 5.0])) == 1  # type: ignore[arg-type]


def test_no_update_has_no_rank() -> None:
    W0, _ = weights((12, 30))
    found = update_singular_values(W0, W0)
    assert not found.any()
    assert math.isnan(effective_rank(found))
    assert math.isnan(stable_rank(found))


@pytest.mark.parametrize(("shape", "other"), [((2, 3), (3, 2)), ((4,), (4,)), ((0, 3), (0, 3))])
def test_other_weights(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of two or more dimensions, but got"):
        update_singular_values(torch.ones(shape), torch.ones(other))
