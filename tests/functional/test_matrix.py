"""`cka_matrix` against `linear_cka` of each pair and against Gram matrices in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_cka.functional import linear_cka, matrix
from lit_cka.functional.matrix import cka_matrix


def layers(n: int, widths: list[int], seed: int) -> list[torch.Tensor]:
    """Off-centre and partly related."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 3, generator=torch.Generator().manual_seed(99))
    return [
        torch.randn(n, d, generator=generator) + shared @ torch.randn(3, d, generator=generator) + 50 * (i + 1)
        for i, d in enumerate(widths)
    ]


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("n", [4, 17, 60])
def test_every_pair_has_its_linear_cka(n: int, gram: bool, debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_gram_form_is_cheaper", lambda *args: gram)
    Xs, Ys = layers(n, [5, 9, 30], 0), layers(n, [7, 20], 1)
    values = cka_matrix(Xs, Ys, debiased=debiased)
    assert values.shape == (3, 2)
    assert values.dtype == torch.float64
    for i, X in enumerate(Xs):
        for j, Y in enumerate(Ys):
            expected = linear_cka(X, Y, debiased=debiased)
            torch.testing.assert_close(values[i, j], expected, atol=1e-10, rtol=0, equal_nan=True)


@pytest.mark.parametrize("gram", [False, True])
def test_a_model_with_itself(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_gram_form_is_cheaper", lambda *args: gram)
    Xs = layers(40, [5, 9, 30], 0)
    values = cka_matrix(Xs, Xs, debiased=True)
    torch.testing.assert_close(values, cka_matrix(Xs, list(Xs), debiased=True), atol=1e-12, rtol=0)
    torch.testing.assert_close(values, values.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(values.diagonal(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("gram", [False, True])
def test_constant_and_not_finite_layers_are_nan(gram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_gram_form_is_cheaper", lambda *args: gram)
    Xs = layers(20, [4, 4, 4], 0)
    Xs[1] = torch.full((20, 4), 0.1) * 3e4
    Xs[2][3, 1] = torch.inf
    values = cka_matrix(Xs, layers(20, [6], 1))
    assert values.isnan().flatten().tolist() == [False, True, True]


def test_the_cheaper_form_is_taken() -> None:
    wide, narrow = layers(8, [500] * 2, 0), layers(600, [4] * 2, 0)
    assert matrix._gram_form_is_cheaper(wide, wide, False)
    assert not matrix._gram_form_is_cheaper(narrow, narrow, False)


@pytest.mark.parametrize("n", [17, 100])
@pytest.mark.parametrize("tile", [1, 25, 40, 256])
def test_tiles_change_nothing(n: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_TILE", tile)
    Xs, Ys = layers(n, [5, 9, 300], 0), layers(n, [7, 20], 1)
    Xs, Ys = ([layer.double() - layer.double().mean(0) for layer in side] for side in (Xs, Ys))
    for A, B in ((Xs, Ys), (Xs, Xs)):
        cross, own_a, own_b = matrix._gram_products(A, B)
        Ks, Ls = (np.stack([layer.numpy() @ layer.numpy().T for layer in side]) for side in (A, B))
        np.testing.assert_allclose(cross, np.einsum("aij,bij->ab", Ks, Ls), rtol=1e-11)
        np.testing.assert_allclose(own_a, (Ks**2).sum((1, 2)), rtol=1e-11)
        np.testing.assert_allclose(own_b, (Ls**2).sum((1, 2)), rtol=1e-11)


def test_what_can_not_be_compared() -> None:
    X = layers(5, [3], 0)
    with pytest.raises(ValueError, match="at least one layer"):
        cka_matrix([], X)
    with pytest.raises(ValueError, match="same samples"):
        cka_matrix(X, layers(6, [3], 0))
    with pytest.raises(ValueError, match="at least 4 samples"):
        cka_matrix(layers(3, [3], 0), layers(3, [3], 1), debiased=True)
