"""The Gram matrix of an update, in parts, against the whole in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import update_gram
from lit_cka.functional.update_gram import as_matrix, chunks, gram_of_update, narrowed, update

SHAPES = pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 2, 3, 3), (1, 7), (7, 1), (20, 20)])


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights far off zero, and a small update of them."""
    generator = torch.Generator().manual_seed(0)
    W0 = 10 + torch.randn(shape, generator=generator)
    return W0.to(dtype), (W0 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)


@SHAPES
@pytest.mark.parametrize("size", [1, 7, 100, 2**19])
@pytest.mark.parametrize("rows", [True, False])
def test_it_is_that_of_the_whole_matrix(
    shape: tuple[int, ...], size: int, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", size)
    W0, W1 = weights(shape)
    w0, w1 = (W.numpy().astype(float).reshape(len(W), -1) for W in (W0, W1))
    delta = w1 - w0
    expected = delta @ delta.T if rows else delta.T @ delta
    gram, norm = gram_of_update(W0, W1, rows)
    assert gram.dtype == torch.float64
    np.testing.assert_allclose(np.tril(gram), np.tril(expected), rtol=1e-12, atol=1e-13)
    assert norm == pytest.approx((w0**2).sum(), rel=1e-12)
    np.testing.assert_array_equal(update(W0, W1), delta)


@SHAPES
@pytest.mark.parametrize("size", [1, 100, 2**19])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_in_float32_are_summed_up_over_parts(
    shape: tuple[int, ...], size: int, rows: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", size)
    monkeypatch.setattr(update_gram, "_BLOCK", 20)
    W0, W1 = weights(shape, dtype)
    delta = update(W0, W1).numpy()
    expected = delta @ delta.T if rows else delta.T @ delta
    gram, norm = gram_of_update(W0, W1, rows, torch.float32)
    assert gram.dtype == torch.float64
    np.testing.assert_allclose(np.tril(gram), np.tril(expected), rtol=1e-6, atol=1e-6)
    assert norm == pytest.approx(W0.double().square().sum().item(), rel=1e-12)


@SHAPES
@pytest.mark.parametrize("rows", [True, False])
def test_parts_make_up_the_matrix(shape: tuple[int, ...], rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", 50)
    matrix = as_matrix(weights(shape)[0])
    parts = [narrowed(matrix, start, stop, rows) for start, stop in chunks(matrix, rows)]
    assert torch.equal(torch.cat(parts, dim=1 if rows else 0), matrix)
    assert max(part.numel() for part in parts) <= max(50, matrix.shape[0 if rows else 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_subtracted_in_float64(dtype: torch.dtype) -> None:
    W0, W1 = weights((6, 9), dtype)
    assert torch.equal(update(W0, W1), W1.double() - W0.double())
    gram, _ = gram_of_update(W0, W1, rows=True)
    delta = update(W0, W1)
    torch.testing.assert_close(gram.tril(), (delta @ delta.T).tril(), rtol=1e-12, atol=1e-14)
