"""Weighted parts of an update, by chunks and blocks, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import update_gram
from lit_cka.functional.update_parts import write_weighted

WEIGHTS = [(0.3, 0.7), (1.0, 0.0), (0.0, 1.0), (-0.5, 2.0), (1.0, 1.0)]  # (outside, inside)
EPS = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def problem(shape: tuple[int, ...], rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights far off zero, and a basis of a third of the directions of one side."""
    generator = torch.Generator().manual_seed(0)
    W0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    W0 += 3
    size = shape[0] if rows else W0[0].numel()
    basis = torch.linalg.qr(torch.randn(size, max(size // 3, 1), generator=generator, dtype=torch.float64)).Q
    return W0, W0 + 0.3 * noise, basis


def expected(W0: Tensor, W1: Tensor, basis: Tensor, rows: bool) -> list[np.ndarray]:
    w0, w1 = (W.double().numpy().reshape(len(W), -1) for W in (W0, W1))
    delta, P = w1 - w0, (basis @ basis.T).numpy()
    part = P @ delta if rows else delta @ P
    return [(w0 + outside * (delta - part) + inside * part).reshape(W1.shape) for outside, inside in WEIGHTS]


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 2, 3, 3), (1, 7), (7, 1), (21, 21)], ids=str)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (50, 7), (100, 1000), (2**20, 2**16)])
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16),
                                    (torch.float16, torch.float32)], ids=str)  # fmt: skip
def test_they_are_those_of_the_whole_matrix(
    shape: tuple[int, ...],
    rows: bool,
    chunk: int,
    block: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(update_gram, "_BLOCK", block)
    start, end, basis = problem(shape, rows)
    W0, W1 = start.to(dtypes[0]), end.to(dtypes[1])
    wanted, inside_of = expected(W0, W1, basis, rows), torch.float64 if W1.dtype == torch.float64 else torch.float32
    targets = [torch.empty_like(W1) for _ in WEIGHTS[1:]]
    write_weighted([*targets, W1], W0, W1, basis.to(inside_of), WEIGHTS, rows=rows)  # the last into `W1` itself
    for target, each in zip([*targets, W1], wanted, strict=True):
        np.testing.assert_allclose(target.double(), each, rtol=EPS[W1.dtype], atol=8 * EPS[W1.dtype])


@pytest.mark.parametrize("rows", [True, False])
def test_the_bits_are_the_same_however_the_weights_lie_in_memory(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_gram, "_CPU_CHUNK", 200)
    monkeypatch.setattr(update_gram, "_BLOCK", 60)
    start, end, basis = problem((23, 37), rows)
    W0, W1 = start.float(), end.float()
    aside = [W.T.contiguous().T for W in (W0, W1)]
    made = []
    for base, tuned in ((W0, W1), (aside[0], W1), (W0, aside[1])):
        targets = [torch.empty(23, 37) for _ in WEIGHTS]
        write_weighted(targets, base, tuned, basis.float(), WEIGHTS, rows=rows)
        made.append(targets)
    for others in made[1:]:
        assert all(map(torch.equal, made[0], others))
