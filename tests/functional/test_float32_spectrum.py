"""Splits by sums in float32: those of float64, or none; and how often none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.functional import spectral
from lit_cka.functional.float32_spectrum import Spectrum, first_directions, float32_spectrum
from lit_cka.functional.spectral import SpectralSplit, spectral_split
from lit_cka.functional.update_gram import gram_of_update
from tests import oracles
from tests.functional.test_spectral import assert_is_the_oracle_s, low_rank, noise, weights

SHAPES = [(130, 400), (160, 160), (300, 140)]


def falling(shape: tuple[int, int], power: float, seed: int = 5) -> Tensor:
    """An update whose i-th singular value is `i ** -power`, times a constant."""
    size, rng = min(shape), np.random.default_rng(seed)
    left, right = (torch.from_numpy(np.linalg.qr(rng.standard_normal((side, size)))[0]) for side in shape)
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return left * (values / values.norm()) @ right.T


UPDATES: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "noise": noise,
    "low rank and noise": lambda shape: low_rank(shape, 8) + 0.1 * noise(shape),
    "low rank and hardly any noise": lambda shape: low_rank(shape, 8) + 1e-5 * noise(shape),
    "falling slowly": lambda shape: falling(shape, 0.5),
    "falling": lambda shape: falling(shape, 1.0),
    "falling fast": lambda shape: falling(shape, 2.0),
    "rank 1": lambda shape: low_rank(shape, 1),
}


def projector(spectrum: Spectrum, k: int, tolerance: float) -> Tensor | None:
    """On the first `k` directions, (m, m) in float64."""
    found = first_directions(spectrum, k, tolerance)
    if found is None:
        return None
    basis, is_of_others = found[0].double(), found[1]
    onto = basis @ basis.T
    return torch.eye(len(onto), dtype=torch.float64) - onto if is_of_others else onto


KINDS = pytest.mark.parametrize("kind", UPDATES)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each split was one of float32."""
    taken: list[bool] = []
    split = spectral._split_in_float32

    def spy(*args: object) -> object:
        found = split(*args)  # type: ignore[arg-type]
        taken.append(found is not None)
        return found

    monkeypatch.setattr(spectral, "_split_in_float32", spy)
    yield taken


@KINDS
@pytest.mark.parametrize(("size", "shape"), list(zip([0.01, 0.2, 3.0], SHAPES, strict=True)), ids=str)
def test_every_update_gives_the_oracle_s_weights(kind: str, size: float, shape: tuple[int, int]) -> None:
    """Whichever way it took. The energies are asked for where half and nine tenths of them are."""
    W0, W1 = weights(shape, size * UPDATES[kind](shape))
    assert_is_the_oracle_s(W0, W1, [("effective_rank", 0.9), ("energy", 0.5), ("energy", 0.9)])


@pytest.mark.parametrize("kind", ["noise", "low rank and noise", "falling slowly", "falling"])
def test_updates_of_fine_tuning_seldom_need_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, more = spectral._singular_values, []

    def spy(*args: Any) -> Tensor:
        more.append(args)
        return values(*args)

    monkeypatch.setattr(spectral, "_singular_values", spy)
    with counted(monkeypatch) as taken:
        for seed in range(8):
            update = UPDATES[kind]((130, 200)) + 1e-4 * noise((130, 200), seed=seed)
            spectral_split(*weights((130, 200), 0.03 * update))
    assert len(taken) == 8
    assert sum(taken) >= 6
    assert len(more) <= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float64_weights_and_small_ones_are_left_to_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch) as taken:
        spectral_split(*weights((127, 300), noise((127, 300)), dtype))
        assert taken == []
        spectral_split(*weights((128, 300), noise((128, 300)), dtype))
        assert len(taken) == (dtype != torch.float64)


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_of_the_spectrum_are_within_what_is_said(kind: str, shape: tuple[int, int]) -> None:
    W0, W1 = weights(shape, 0.1 * UPDATES[kind](shape))
    U, s, Vh = oracles.update_svd(W0, W1)
    gram, _ = gram_of_update(W0, W1, shape[0] <= shape[1], torch.float32)
    spectrum = float32_spectrum(gram)
    assert spectrum is not None
    squares, errors = spectrum.singular_values.square().numpy(), spectrum.energy_errors.numpy()
    energies = np.cumsum(squares) / squares.sum() - np.cumsum(s**2) / np.sum(s**2)
    assert np.abs(energies).max() <= errors.sum() / squares.sum() + 1e-15
    side = U if shape[0] <= shape[1] else Vh.T
    for k in (1, 3, len(s) // 3, len(s) - 1, len(s)):
        for tolerance in (1e-6, 1e-4, 1e-2):
            found = projector(spectrum, k, tolerance)
            if found is None:
                continue
            gram_root = side * s  # the update, turned so that its other side is the identity
            difference = found.numpy() @ gram_root - side[:, :k] @ (side[:, :k].T @ gram_root)
            assert np.linalg.norm(difference) <= (4 * tolerance + 4e-6) * np.linalg.norm(s), (k, tolerance)


def test_neighbours_that_float32_mixes_up_are_told_apart() -> None:
    """Of 140 directions of about one energy, the cut goes between two that differ by a hundred thousandth."""
    values = torch.linspace(1.0, 0.9, 140, dtype=torch.float64)
    values[70] = values[69] * (1 - 1e-5)
    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(np.linalg.qr(rng.standard_normal((140, 140)))[0]) for _ in range(2))
    W1 = left * values @ right.T
    gram = W1 @ W1.T
    spectrum = float32_spectrum(gram.clone())
    assert spectrum is not None

    def turned(high: Tensor) -> float:
        return float(torch.linalg.matrix_norm(high - left[:, :70] @ left[:, :70].T))

    vectors = spectrum.vectors(70, 140).double()
    told_apart = projector(spectrum, 70, 5e-4)
    assert told_apart is not None
    assert turned(told_apart) < 5e-5 < turned(vectors @ vectors.T) / 5


def next_to_a_whole_rank(seed: int, above: float) -> tuple[Tensor, Tensor]:
    """Weights whose update has an effective rank a little above a whole number, as NumPy has it in float64."""
    shape = (130, 150)
    strong, weak = low_rank(shape, 40, seed=10 * seed), noise(shape, seed=10 * seed + 5)

    def at(share: float) -> tuple[Tensor, Tensor, float]:
        W0, W1 = weights(shape, 0.1 * (strong + share * weak))
        s = oracles.update_svd(W0, W1)[1]
        p = s / s.sum()
        return W0, W1, float(np.exp(-(p * np.log(p)).sum()))

    low, high = 0.2, 0.6
    target = math.floor(at(high)[2]) + above
    assert at(low)[2] < target < at(high)[2]
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[2] < target else (low, middle)
    return at(high)[:2]


@pytest.mark.parametrize("above", [3e-7, pytest.param(-3e-7, marks=pytest.mark.slow)])
def test_a_rank_that_float32_can_not_tell_is_that_of_float64(above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directions are still those of float32: singular values are all that is computed once more."""
    for seed in range(6):
        W0, W1 = next_to_a_whole_rank(seed, above)
        with counted(monkeypatch) as taken:
            assert_is_the_oracle_s(W0, W1, [("effective_rank", 0.9)])
        assert taken == [True], seed


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
def test_weights_of_any_size(scale: float) -> None:
    W0, W1 = weights((130, 160), 0.1 * low_rank((130, 160), 20))
    expected, split = spectral_split(W0, W1), spectral_split(W0 * scale, W1 * scale)
    assert isinstance(expected, SpectralSplit)
    assert isinstance(split, SpectralSplit)
    assert split.rank == expected.rank
    assert split.coefficients == pytest.approx(expected.coefficients, abs=1e-5)
    assert split.relative_change == pytest.approx(expected.relative_change, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    W0, W1 = weights((130, 160), noise((130, 160)))
    W1[3, 4] = bad
    with pytest.raises(ValueError, match="Expected finite weights"):
        spectral_split(W0, W1)


def assert_same_bits(split: SpectralSplit | float, expected: SpectralSplit | float) -> None:
    assert isinstance(expected, SpectralSplit)
    assert isinstance(split, SpectralSplit)
    assert (split.rank, split.coefficients) == (expected.rank, expected.coefficients)
    assert torch.equal(split.basis, expected.basis)


def test_a_lower_precision_of_the_user_s_changes_nothing() -> None:
    W0, W1 = weights((200, 300), low_rank((200, 300), 8) + 0.1 * noise((200, 300)))
    expected = spectral_split(W0, W1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        split = spectral_split(W0, W1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(split, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_of_the_user_s_changes_nothing(dtype: torch.dtype) -> None:
    """LAPACK is given addresses: numbers of another size there would be wrong, or end the process."""
    W0, W1 = weights((200, 300), low_rank((200, 300), 8) + 0.1 * noise((200, 300)))
    expected, before = spectral_split(W0, W1), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        split = spectral_split(W0, W1)
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(split, expected)
