"""Products of permuted matrices against indexing, and their moments against all permutations there are."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import skew
from torch import Tensor

from lit_cka.functional import linear_gram, permutation_moments, permuted_products, rbf_gram
from lit_cka.functional import permutations as module
from lit_cka.functional.centring import double_centred
from lit_cka.functional.permutations import draw_orders
from tests.oracles import paired_features


def matrices(n: int, count: int = 3) -> tuple[Tensor, Tensor]:
    """Centred Gram matrices: narrow, wide, of another kernel, with a sample far from the others; off centre."""
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for seed in range(count):
        for side, features in zip(sides, paired_features(n, 3 + 9 * seed, 5 - seed, seed=seed), strict=True):
            features[0] *= 1 + 3 * (seed == 1)
            side.append(double_centred(rbf_gram(features) if seed == 2 else linear_gram(features)))
    return torch.stack(sides[0]), torch.stack(sides[1])


def u_centred(K: np.ndarray) -> np.ndarray:
    """Szekely & Rizzo 2014, definition 2."""
    n, K = len(K), K - np.diag(np.diag(K))
    A = K - (K.sum(0)[:, None] + K.sum(0)) / (n - 2) + K.sum() / ((n - 1) * (n - 2))
    return A - np.diag(np.diag(A))


@pytest.mark.parametrize("n", [6, 7])
def test_moments_are_those_of_all_permutations(n: int) -> None:
    As, Bs = matrices(n)
    indefinite = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    As = torch.cat([As, double_centred(indefinite + indefinite.T)[None]])
    Bs = torch.cat([Bs, torch.from_numpy(u_centred(Bs[0].numpy()))[None]])
    orders = np.array(list(permutations(range(n))))
    found = permutation_moments(As, Bs)
    for i, A in enumerate(As.numpy()):
        for j, B in enumerate(Bs.numpy()):
            values = np.einsum("ij,tij->t", A, B[orders[:, :, None], orders[:, None]])
            assert found.mean[i, j].item() == pytest.approx(values.mean(), rel=1e-11, abs=1e-12 * np.abs(values).max())
            assert found.variance[i, j].item() == pytest.approx(values.var(), rel=1e-10)
            assert found.skewness[i, j].item() == pytest.approx(skew(values), abs=1e-10)


@pytest.mark.parametrize("n", [6, 30, 200])
def test_the_variance_of_the_debiased_cka_depends_on_n_alone(n: int) -> None:
    As, Bs = (torch.stack([torch.from_numpy(u_centred(K.numpy())) for K in side]) for side in matrices(n))
    found = permutation_moments(As, Bs)
    sizes = torch.outer(As.flatten(1).norm(dim=1), Bs.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.variance / sizes**2, torch.full_like(sizes, 2 / (n * (n - 3))))
    assert (found.mean / sizes).abs().max() < 1e-12


def test_moments_are_those_of_many_permutations_of_many_samples() -> None:
    As, Bs = matrices(60)
    values = permuted_products(As, Bs, draw_orders(60, 4000, seed=0)).numpy()
    sizes = torch.outer(As.flatten(1).norm(dim=1), Bs.flatten(1).norm(dim=1))
    found = permutation_moments(As, Bs)
    spread = (found.variance.sqrt() / sizes).numpy()
    np.testing.assert_allclose(values.mean(0), found.mean / sizes, atol=4 * spread.max() / np.sqrt(4000))
    np.testing.assert_allclose(values.std(0), spread, rtol=0.07)
    np.testing.assert_allclose(skew(values), found.skewness, atol=0.35)
    assert found.skewness.min() > 0.1


def test_few_samples_and_fixed_products() -> None:
    As, Bs = matrices(5)
    with pytest.raises(ValueError, match="at least 6 samples for the moments over permutations, but got 5"):
        permutation_moments(As, Bs)
    equidistant = double_centred(torch.eye(8, dtype=torch.float64))[None]
    found = permutation_moments(equidistant, matrices(8)[1])
    assert found.variance.abs().max() < 1e-20
    assert (found.mean > 0).all()


def test_products_are_those_of_permuted_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 23
    Ks, Ls = matrices(n)
    Ks, Ls = 1e30 * Ks, 1e-30 * Ls[:2]
    orders = draw_orders(n, 7, seed=3)
    found = permuted_products(Ks, Ls, orders)
    assert found.shape == (7, 3, 2)
    assert found.dtype == torch.float64
    for t, order in enumerate(orders):
        for i, K in enumerate(Ks):
            for j, L in enumerate(Ls):
                expected = (K * L[order][:, order]).sum() / (K.norm() * L.norm())
                assert found[t, i, j].item() == pytest.approx(expected.item(), abs=1e-7)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 60)
    torch.testing.assert_close(permuted_products(Ks, Ls, orders), found, rtol=0, atol=1e-7)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(permuted_products(Ks, Ls, orders), found, rtol=0, atol=1e-7)
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_of_nothing_are_undefined() -> None:
    Ks, Ls = matrices(8)
    Ks[1], Ls[2, 3, 3] = 0, torch.nan
    found = permuted_products(Ks, Ls, draw_orders(8, 2, seed=0))
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[1], expected[:, 2] = True, True
    assert (found.isnan() == expected).all()


def test_orders_are_permutations_of_the_seed() -> None:
    state = torch.random.get_rng_state()
    orders = draw_orders(9, 300, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(9).expand(300, 9))
    assert torch.equal(orders, draw_orders(9, 300, seed=1))
    assert not torch.equal(orders, draw_orders(9, 300, seed=2))
    assert orders.double().mean(dim=0).std() < 0.5
