"""LAPACK's own routines: the eigenvectors that are asked for, and products with a transpose; from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional.lapack import SymmetricEigen, _call, in_one_thread, lower_gram


def symmetric(size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(size, size, generator=draw) + 0.3
    return A + A.T


@pytest.mark.parametrize("size", [1, 2, 33, 150])
def test_eigenvectors_are_those_of_numpy_one_by_one(size: int) -> None:
    A = symmetric(size)
    values = np.linalg.eigvalsh(A.double().numpy())
    eigen = SymmetricEigen(A.clone())
    tolerance = 20 * torch.finfo(torch.float32).eps * np.abs(values).max()
    assert np.abs(eigen.values.double().numpy() - values).max() <= tolerance
    for first, last in {(0, size), (0, size // 3), (size // 3, size), (size - 1, size), (1, 1)}:
        found = eigen.vectors(first, last).double().numpy()
        assert found.shape == (size, last - first)
        assert np.abs(A.double().numpy() @ found - found * values[first:last]).max(initial=0) <= 3 * tolerance
        assert np.abs(found.T @ found - np.eye(last - first)).max(initial=0) <= 1e-5
    assert torch.equal(eigen.vectors(0, size)[:, size // 2 :], eigen.vectors(size // 2, size))


def test_what_lapack_complains_of_is_an_error() -> None:
    A, values = symmetric(4), torch.empty(4)
    with pytest.raises(ValueError, match="Expected a matrix that LAPACK can decompose, but its routine ssyev says -2"):
        _call("lapack", "ssyev", "N", "?", 4, A, 4, values, torch.empty(64), 64)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 70), (300, 20)])
@pytest.mark.parametrize("by_rows", [True, False])
def test_a_gram_matrix_is_written_to_the_lower_triangle(shape: tuple[int, int], by_rows: bool) -> None:
    n, m = shape
    X = torch.randn(n, m, generator=torch.Generator().manual_seed(1)) + 2
    columns = X if by_rows else X.T.contiguous().T
    out = torch.full((m, m), 3.0)
    lower_gram(columns, out)
    expected = X.double().T @ X.double()
    assert ((out - expected).tril().abs() <= 1e-5 * n * X.square().max()).all()
    assert (out.triu(1) == torch.full((m, m), 3.0).triu(1)).all()


def test_several_threads_get_what_one_gets() -> None:
    matrices = [symmetric(150, seed) for seed in range(8)]

    def work(A: Tensor) -> Tensor:
        return SymmetricEigen(A.clone()).vectors(20, 90)

    expected = [work(A) for A in matrices]
    with in_one_thread(), ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(work, matrices), expected))
    with ThreadPoolExecutor(4) as pool:  # without it, threads of BLAS itself may take part
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(pool.map(work, matrices), expected, strict=True))


@pytest.mark.parametrize("A", [symmetric(9).double(), symmetric(18)[::2, ::2]], ids=["float64", "with gaps"])
def test_other_numbers_are_an_error(A: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected float32 numbers without gaps, on a CPU, but got torch\.float"):
        SymmetricEigen(A)
