"""Edits of one weight against their formulas in NumPy, on weights far from 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from lit_cka.functional import edits
from tests import oracles
from tests.oracles import float64

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
SHAPES = pytest.mark.parametrize("shape", [(12, 30), (30, 12), (8, 3, 2, 2)], ids=str)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight around 2, and one with an update of low rank and noise."""
    rng = np.random.default_rng(seed)
    rest = math.prod(shape[1:])
    low_rank = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, rest))
    W0 = 2 + rng.standard_normal(shape)
    W1 = W0 + (0.3 * low_rank + 0.05 * rng.standard_normal((shape[0], rest))).reshape(shape)
    return torch.from_numpy(W0).to(dtype), torch.from_numpy(W1).to(dtype)


def assert_rounded(made: Tensor, expected: np.ndarray, W1: Tensor) -> None:
    """Of the dtype and shape of W1, and right but for that dtype's rounding, and for float32's."""
    assert (made.dtype, made.shape) == (W1.dtype, W1.shape)
    step = max(torch.finfo(W1.dtype).eps, 1e-15 if W1.dtype == torch.float64 else 2e-7)
    assert np.abs(float64(made) - expected).max() <= 4 * step * np.abs(expected).max()


@DTYPES
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_wise_ft(alpha: float, dtype: torch.dtype) -> None:
    W0, W1 = pair((12, 30), dtype)
    made = edits.wise_ft(W0, W1, alpha=alpha)
    assert_rounded(made, (1 - alpha) * float64(W0) + alpha * float64(W1), W1)
    with pytest.raises(ValueError, match="Expected `alpha` to be a finite number, but got nan"):
        edits.wise_ft(W0, W1, alpha=math.nan)


@pytest.mark.parametrize(("depth", "scale"), [(None, 0.2), (0.0, 0.2), (0.5, 0.5), (1.0, 0.8)])
def test_lines(depth: float | None, scale: float) -> None:
    W0, W1 = pair((12, 30))
    made = edits.lines(W0, W1, alpha=0.2, beta=0.6, depth=depth)
    assert_rounded(made, float64(W0) + scale * (float64(W1) - float64(W0)), W1)


@DTYPES
@SHAPES
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_trim(density: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    W0, W1 = pair(shape, dtype)
    made = edits.trim(W0, W1, density=density)
    sizes = np.abs(float64(W1) - float64(W0))
    kept = float64(made) == float64(W1)
    from_before = float64(made) == float64(W0)
    assert (kept | from_before).all()
    number = round(density * W1.numel())
    assert (kept & (sizes > 0)).sum() <= number
    assert (sizes[kept & (sizes > 0)].size == 0) == (number == 0)
    if 0 < number < W1.numel():
        assert sizes[kept & (sizes > 0)].min() >= np.sort(sizes.ravel())[-number]
        assert sizes[~kept].max() <= np.sort(sizes.ravel())[-number]
    assert made.data_ptr() != W1.data_ptr()


def test_trim_by_hand() -> None:
    W0, W1 = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 0.0, 3.1, 5.0])
    assert edits.trim(W0, W1, density=0.5).tolist() == [1.0, 0.0, 3.0, 5.0]
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="Expected `density` to be a share"):
            edits.trim(W0, W1, density=density)


@DTYPES
@SHAPES
def test_dare(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    W0, W1 = pair(shape, dtype)
    made = edits.dare(W0, W1, drop=0.4, seed=3)
    before, delta = float64(W0), float64(W1) - float64(W0)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)).numpy() >= 0.4
    assert_rounded(made, before + mask * delta / 0.6, W1)
    assert 0.3 < mask.mean() < 0.9
    assert torch.equal(made, edits.dare(W0, W1, drop=0.4, seed=3))
    assert not torch.equal(made, edits.dare(W0, W1, drop=0.4, seed=4))
    torch.testing.assert_close(edits.dare(W0, W1, drop=0.0, seed=0), W1)


def test_dare_keeps_the_mean_update() -> None:
    W0, W1 = torch.zeros(400, 500), torch.ones(400, 500)
    made = edits.dare(W0, W1, drop=0.9, seed=0)
    assert sorted(made.unique().tolist()) == pytest.approx([0.0, 10.0], rel=1e-6)
    assert made.mean().item() == pytest.approx(1, abs=0.03)  # 4 standard deviations
    for drop in (1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="Expected `drop` to be"):
            edits.dare(W0, W1, drop=drop, seed=0)


def omega(beta: float) -> float:
    """Gavish & Donoho 2014, eqs. 11 and 10, by SciPy's integrals."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(t: float) -> float:
        return math.sqrt(max((high - t) * (t - low), 0.0)) / (2 * math.pi * beta * t) if t > 0 else 0.0

    def below(x: float) -> float:
        return float(scipy.integrate.quad(density, low, x, limit=500)[0])

    median = scipy.optimize.brentq(lambda x: below(x) - 0.5, low + 1e-9, high - 1e-9)
    squared = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    return math.sqrt(squared / median)


@pytest.mark.parametrize("beta", [0.02, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_the_optimal_hard_threshold(beta: float) -> None:
    """The authors' table has 2.0235 for 0.5 (1.9 in one digit for 0.3), and 2.858 for square matrices."""
    found = edits.hard_threshold(round(1000 * beta), 1000)
    assert found == pytest.approx(omega(beta), rel=2e-5)
    approximation = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43  # their eq. 5, good to 0.02
    assert found == pytest.approx(approximation, abs=0.03)


@DTYPES
@SHAPES
def test_dg_hard(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    W0, W1 = pair(shape, dtype)
    U, s, Vh = oracles.update_svd(W0, W1)
    m, n = sorted((shape[0], math.prod(shape[1:])))
    high = s > omega(m / n) * np.median(s)
    assert 0 < high.sum() < len(s)
    expected = float64(W0) + ((U * (s * high)) @ Vh).reshape(shape)
    made = edits.dg_hard(W0, W1)
    if dtype == torch.bfloat16:
        assert np.abs(float64(made) - expected).max() <= 0.01 * np.abs(expected).max()
    else:
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert np.linalg.norm(float64(made) - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (4,)], ids=str)
def test_dg_hard_of_what_is_no_matrix_is_one_clear_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected `W0` and `W1` to be weights of the same shape, of two or more"):
        edits.dg_hard(torch.zeros(shape), torch.ones(shape))


def test_dg_hard_of_noise_leaves_hardly_anything() -> None:
    rng = np.random.default_rng(0)
    W0, W1 = torch.zeros(200, 300), torch.from_numpy(rng.standard_normal((200, 300))).float()
    assert edits.dg_hard(W0, W1).norm() <= 0.2 * W1.norm()
    spike = torch.from_numpy(np.outer(rng.standard_normal(200), rng.standard_normal(300))).float()
    made = edits.dg_hard(W0, W1 + spike)
    assert (made - spike).norm() < 0.25 * spike.norm()
    with pytest.raises(ValueError, match="Expected finite weights"):
        edits.dg_hard(W0, W1 * math.nan)


@DTYPES
@SHAPES
@pytest.mark.parametrize(("rule", "R"), [("effective_rank", 0.8), ("energy", 0.6)])
def test_shrink_leaves_the_norm_that_monosoup_leaves(
    rule: edits.RankRule, R: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    W0, W1 = pair(shape, dtype)
    svd = oracles.update_svd(W0, W1)
    k = oracles.monosoup_rank(svd[1], rule, R)
    monosoup = oracles.monosoup_weights(W0, svd, k, *oracles.monosoup_coefficients(svd[1], k)[2:])["monosoup"]
    before, delta = float64(W0), float64(W1) - float64(W0)
    factor = np.linalg.norm(monosoup - before) / np.linalg.norm(delta)
    assert 0.3 < factor < 0.999
    assert_rounded(edits.shrink(W0, W1, rule=rule, R=R), before + factor * delta, W1)


def test_shrink_of_nothing() -> None:
    W0 = torch.ones(3, 4)
    assert torch.equal(edits.shrink(W0, W0.clone()), W0)
    W1 = W0 + torch.tensor([[1e-3, 0, 0, 0], [0, 1e-4, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(edits.shrink(W0, W1, min_rel_update=1e-2), W1)
    assert not torch.equal(edits.shrink(W0, W1, rule="energy", R=0.5), W1)


def test_uniform_soup() -> None:
    W0, W1 = pair((4, 5))
    others = [W1 + 3, W1 - 9]
    assert_rounded(edits.uniform_soup(W0, W1, others=others), float64(W1) - 2, W1)
    values = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]
    assert edits.uniform_soup(W0, values[0], others=values[1:]).item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        lambda W0, W1: edits.wise_ft(W0, W1, alpha=0.3),
        lambda W0, W1: edits.trim(W0, W1, density=0.3),
        lambda W0, W1: edits.dare(W0, W1, drop=0.3, seed=0),
        edits.dg_hard,
        edits.shrink,
        lambda W0, W1: edits.uniform_soup(W0, W1, others=[W0]),
    ],
)
def test_edits_change_no_input(edit: Callable[[Tensor, Tensor], Tensor]) -> None:
    held, copies = pair((6, 7)), pair((6, 7))
    edit(*held)
    assert all(torch.equal(value, copy) for value, copy in zip(held, copies, strict=True))
