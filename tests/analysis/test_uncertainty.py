"""Intervals: their sums against loops, and how often they cover."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.analysis import uncertainty
from lit_cka.analysis.resampling import ResampledGram, Resamples, draw_counts, u_centred
from lit_cka.analysis.uncertainty import bootstrap_cka
from lit_cka.functional import cka_from_gram, linear_gram, rbf_gram
from tests import oracles
from tests.oracles import paired_features

ESTIMATORS = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])


def grams(n: int, count: int, *, related: bool = True, offset: float = 3.0) -> tuple[Tensor, Tensor]:
    pairs = [paired_features(n, 4, 3, related=related, offset=offset, seed=seed) for seed in range(count)]
    return tuple(torch.stack([linear_gram(pair[side]) for pair in pairs]) for side in (0, 1))  # type: ignore[return-value]


def once(n: int) -> Resamples:
    return Resamples(torch.ones(n, 1, dtype=torch.float64))


@ESTIMATORS
def test_with_every_sample_once_it_is_cka(debiased: bool) -> None:
    (K,), (L,) = grams(9, 1)
    K, L = K + 1e3, rbf_gram(L)
    value = uncertainty._estimate(*(ResampledGram(u_centred(gram, debiased), once(9)) for gram in (K, L))).value
    assert value.item() == pytest.approx(oracles.cka(K.numpy(), L.numpy(), debiased), abs=1e-9)
    assert value.item() == pytest.approx(cka_from_gram(K, L, debiased=debiased).item(), abs=1e-9)


def test_a_resample_is_the_mean_over_quadruples_of_different_samples() -> None:
    (K,), (L,) = grams(7, 1)
    W = draw_counts(7, 5, seed=0).to(K)
    A, B = u_centred(K, True), u_centred(L, True)
    resamples = Resamples(W)
    total, _ = ResampledGram(A, resamples).inner(ResampledGram(B, resamples))
    quadruples = np.array(list(permutations(range(7), 4)))
    i, j, q, r = quadruples.T
    a, b = A.A.numpy(), B.A.numpy()
    for column, w in enumerate(W.T.numpy()):
        weights = np.prod(w[quadruples], axis=1)
        mean = np.zeros(3)
        for term, (terms, members) in enumerate(
            [(a[i, j] * b[i, j], 2), (a[i, j] * b[i, q], 3), (a[i, j] * b[q, r], 4)]
        ):
            weights = np.prod(w[quadruples[:, :members]], axis=1)
            # Fewer members: every tuple comes up several times, which the mean does not feel.
            mean[term] = np.sum(weights * terms) / np.sum(weights)
        # The sum for which its mean stands in.
        smallest = w**2 @ (a * b) @ w**2
        stand_in = (w @ (a * b) @ w) * (np.sum(w**2) / 7) ** 2
        quads = np.sum(np.prod(w[quadruples], axis=1))
        expected = mean @ [1, -2, 1] + 2 * (stand_in - smallest) / quads
        assert total[column].item() / (7 * 4) == pytest.approx(expected, rel=1e-10)


@ESTIMATORS
@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
def test_the_standard_error_is_that_of_the_jackknife(debiased: bool, related: bool) -> None:
    n = 60
    (K,), (L,) = grams(n, 1, related=related)
    error = uncertainty._estimate(*(ResampledGram(u_centred(gram, debiased), once(n)) for gram in (K, L))).error
    rest = [np.delete(np.arange(n), i) for i in range(n)]
    values = np.array([oracles.cka(K.numpy()[np.ix_(i, i)], L.numpy()[np.ix_(i, i)], debiased) for i in rest])
    jackknife = np.sqrt((n - 1) / n * np.sum((values - values.mean()) ** 2))
    assert error.item() == pytest.approx(jackknife, rel=0.1)


@ESTIMATORS
def test_intervals_of_many_pairs_are_those_of_each(debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Ks, Ls = grams(20, 3)
    low, high = bootstrap_cka(Ks, Ls[:2], debiased=debiased, num_resamples=70)
    assert low.shape == high.shape == (3, 2)
    assert low.dtype == torch.float64
    for i, K in enumerate(Ks):
        for j, L in enumerate(Ls[:2]):
            value = cka_from_gram(K, L, debiased=debiased)
            assert -1 <= low[i, j] < value < high[i, j] <= 1
            alone = bootstrap_cka(K[None], L[None], debiased=debiased, num_resamples=70)
            torch.testing.assert_close(torch.stack(alone).flatten(), torch.stack([low[i, j], high[i, j]]))
    monkeypatch.setattr(uncertainty, "_CHUNK", 32)
    torch.testing.assert_close(bootstrap_cka(Ks, Ls[:2], debiased=debiased, num_resamples=70), (low, high))


@ESTIMATORS
def test_intervals_ignore_scale_and_what_is_added(debiased: bool) -> None:
    Ks, Ls = grams(20, 1)
    expected = bootstrap_cka(Ks, Ls, debiased=debiased, num_resamples=100)
    shift = torch.linspace(-3, 3, 20, dtype=torch.float64)
    changed = bootstrap_cka(1e-3 * Ks + 50, 40 * Ls + shift + shift[:, None], debiased=debiased, num_resamples=100)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-9)
    swapped = bootstrap_cka(Ls, Ks, debiased=debiased, num_resamples=100)
    torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-9)


def u_centred_oracle(K: np.ndarray) -> np.ndarray:
    """Szekely & Rizzo 2014, definition 2, which needs no centred matrix to start from."""
    n, K = len(K), K - np.diag(np.diag(K))
    A = K - (K.sum(0)[:, None] + K.sum(0)) / (n - 2) + K.sum() / ((n - 1) * (n - 2))
    return A - np.diag(np.diag(A))


def studentised_oracle(K: np.ndarray, L: np.ndarray, W: np.ndarray, level: float) -> tuple[float, float]:
    """The interval of the docstring, one resample after the other, from the U-statistics of `ResampledGram.inner`."""
    n, A, B = len(K), u_centred_oracle(K), u_centred_oracle(L)

    def statistics(w: np.ndarray) -> tuple[float, np.ndarray]:
        drawn = [
            ResampledGram(u_centred(torch.from_numpy(gram), True), Resamples(torch.from_numpy(w[:, None])))
            for gram in (K, L)
        ]
        (xy, _), (xx, yy) = drawn[0].inner(drawn[1]), (one.square for one in drawn)
        T, size = xy.item() / np.sqrt(xx.item() * yy.item()), np.sqrt(xx.item() * yy.item())
        kernel = A * B / size - T / 2 * (A**2 / xx.item() + B**2 / yy.item())
        return T, 2 * n * (n - 3) / (n - 1) * kernel @ w

    def error(influence: np.ndarray, w: np.ndarray) -> float:
        mean = np.average(influence, weights=w)
        return np.sqrt(np.average((influence - mean) ** 2, weights=w) / n)

    once = np.ones(n)
    T, influence = statistics(once)
    influence -= influence.mean()
    s = error(influence, once)
    xx, yy = np.sum(A * A), np.sum(B * B)
    Q = n * (n - 3) * (A * B / np.sqrt(xx * yy) - T / 2 * (A**2 / xx + B**2 / yy))
    shrink = np.sqrt(max(0, 1 - 4 * oracles.unbiased_hsic(Q, Q) / n**2 / s**2))
    assert 0.3 < shrink < 0.99
    t = []
    for w in W.T:
        T_star, influence_star = statistics(w)
        s_star = error(influence_star - (1 - shrink) * influence, w)
        linear = (1 - shrink) * (influence @ w) / n / (1 - T**2)
        t.append((np.arctanh(T_star) - np.arctanh(T) - linear) / (s_star / (1 - T_star**2)))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    scale = s / (1 - T**2)
    return np.tanh(np.arctanh(T) - high * scale), np.tanh(np.arctanh(T) - low * scale)


@pytest.mark.parametrize("related", [True, False], ids=["related", "unrelated"])
def test_intervals_equal_the_formula_written_out(related: bool) -> None:
    Ks, Ls = grams(25, 1, related=related)
    low, high = bootstrap_cka(Ks, Ls, num_resamples=60, level=0.9, seed=4)
    expected = studentised_oracle(Ks[0].numpy(), Ls[0].numpy(), draw_counts(25, 60, seed=4).double().numpy(), 0.9)
    assert (low.item(), high.item()) == pytest.approx(expected, abs=1e-9)


def test_samples_are_drawn_with_replacement() -> None:
    W = draw_counts(40, 2000, seed=0)
    assert (W.sum(0) == 40).all()
    assert W.var().item() == pytest.approx(1 - 1 / 40, abs=0.03)  # multinomial
    assert not torch.equal(W, draw_counts(40, 2000, seed=1))


def test_seed_and_level() -> None:
    Ks, Ls = grams(30, 1)
    assert bootstrap_cka(Ks, Ls, num_resamples=200) == bootstrap_cka(Ks, Ls, num_resamples=200, seed=0)
    assert bootstrap_cka(Ks, Ls, num_resamples=200) != bootstrap_cka(Ks, Ls, num_resamples=200, seed=1)
    state = torch.random.get_rng_state()
    ends = [torch.stack(bootstrap_cka(Ks, Ls, num_resamples=400, level=level)).flatten() for level in (0.5, 0.9, 0.99)]
    assert torch.equal(torch.random.get_rng_state(), state)
    lows, highs = torch.stack(ends).T
    assert (lows.diff() < 0).all()
    assert (highs.diff() > 0).all()


def test_a_model_with_itself_gives_a_symmetric_matrix() -> None:
    Ks, _ = grams(20, 3)
    ends = bootstrap_cka(Ks, Ks, num_resamples=50)
    for end, expected in zip(ends, bootstrap_cka(Ks, Ks.clone(), num_resamples=50), strict=True):
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(end, end.T, rtol=0, atol=1e-12)


@ESTIMATORS
@pytest.mark.parametrize("n", [4, 20])  # with 4, some standard errors are exactly 0, not only nearly
def test_a_matrix_with_itself_has_no_uncertainty(n: int, debiased: bool) -> None:
    Ks, _ = grams(n, 8)
    one = torch.ones(8, dtype=torch.float64)
    for Ls in (Ks, 3 * Ks):
        low, high = bootstrap_cka(Ks, Ls, debiased=debiased, num_resamples=50)
        torch.testing.assert_close(low.diagonal(), one, rtol=0, atol=1e-12)
        torch.testing.assert_close(high.diagonal(), one, rtol=0, atol=1e-12)
        assert n == 4 or low[0, 1] < high[0, 1]


@ESTIMATORS
def test_nan_where_cka_is(debiased: bool) -> None:
    Ks, Ls = grams(12, 1)
    bad = torch.full_like(Ks, torch.nan)
    constant = torch.full_like(Ks, 0.3)
    stacked = torch.cat([Ks, bad, constant])
    for result in bootstrap_cka(stacked, Ls, debiased=debiased, num_resamples=50):
        assert result.isnan().flatten().tolist() == [False, True, True]
    equidistant = torch.eye(12, dtype=torch.float64)[None]  # only the plain estimator is defined
    for result in bootstrap_cka(equidistant, Ls, debiased=True, num_resamples=50):
        assert result.isnan().all()


@pytest.mark.parametrize("n", [4, 6, 9])
def test_very_few_samples_give_an_interval_or_nan(n: int) -> None:
    for ends in (bootstrap_cka(*grams(n, 2), debiased=debiased) for debiased in (True, False)):
        for end in ends:
            assert ((end.abs() <= 1) | end.isnan()).all()


def normal_pairs(
    n: int, draws: int, *, share: float, noise: float, d: int = 10, seed: int = 0
) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """Features of five common factors, off centre, and the CKA of their population."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((5, d)), share * rng.standard_normal((5, d + 3))
    cov_x, cov_y = A.T @ A + noise**2 * np.eye(d), B.T @ B + noise**2 * np.eye(d + 3)
    population = np.sum((A.T @ B) ** 2) / (np.linalg.norm(cov_x) * np.linalg.norm(cov_y))
    pairs = []
    for _ in range(draws):
        Z = rng.standard_normal((n, 5))
        X, Y = (Z @ C + noise * rng.standard_normal((n, C.shape[1])) + 3 for C in (A, B))
        pairs.append((torch.from_numpy(X), torch.from_numpy(Y)))
    return float(population), pairs


def coverage(population: float, pairs: list[tuple[Tensor, Tensor]], num_resamples: int) -> float:
    covered = 0
    for seed, (X, Y) in enumerate(pairs):
        ends = bootstrap_cka(linear_gram(X)[None], linear_gram(Y)[None], num_resamples=num_resamples, seed=seed)
        low, high = (end.item() for end in ends)
        covered += low <= population <= high
    return covered / len(pairs)


SETTINGS = {"high": (1.0, 0.1), "middle": (1.0, 1.0), "low": (0.15, 1.0), "unrelated": (0.0, 1.0)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_cover_the_population(setting: str) -> None:
    """Bounds that 100 draws keep in 999 of 1,000 runs where 95 % are covered."""
    share, noise = SETTINGS[setting]
    population, pairs = normal_pairs(50, 100, share=share, noise=noise)
    assert 0.87 <= coverage(population, pairs, num_resamples=199) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 100, 200])
@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_are_calibrated(setting: str, n: int) -> None:
    share, noise = SETTINGS[setting]
    population, pairs = normal_pairs(n, 400, share=share, noise=noise)
    assert 0.92 <= coverage(population, pairs, num_resamples=999) <= 0.98


def test_unrelated_features_do_not_get_intervals_that_are_too_wide() -> None:
    """Without shrinking the influences, they would be 1.2 times as wide, and cover 99 %."""
    _, pairs = normal_pairs(60, 60, share=0.0, noise=1.0)
    Ks, Ls = (torch.stack([linear_gram(pair[side]) for pair in pairs]) for side in (0, 1))
    values = torch.stack([cka_from_gram(K, L, debiased=True) for K, L in zip(Ks, Ls, strict=True)])
    ends = [bootstrap_cka(K[None], L[None], num_resamples=199) for K, L in zip(Ks, Ls, strict=True)]
    width = torch.stack([high - low for low, high in ends]).mean()
    assert 3.4 < width / values.std() < 4.6


def test_wrong_input_is_an_error() -> None:
    K = torch.ones(1, 5, 5)
    with pytest.raises(ValueError, match=r"stacks of square matrices .* got \(5, 5\) and \(1, 5, 5\)"):
        bootstrap_cka(K[0], K)
    with pytest.raises(ValueError, match=r"of the same size .* got \(1, 5, 5\) and \(1, 4, 4\)"):
        bootstrap_cka(K, K[:, :4, :4])
    with pytest.raises(ValueError, match=r"floating point, but got torch\.int64"):
        bootstrap_cka(K.long(), K)
    with pytest.raises(ValueError, match="at least 4 samples, but got 3"):
        bootstrap_cka(K[:, :3, :3], K[:, :3, :3])
    with pytest.raises(ValueError, match="`num_resamples` to be at least 1, but got 0"):
        bootstrap_cka(K, K, num_resamples=0)
    with pytest.raises(ValueError, match="`level` to be between 0 and 1, but got 95"):
        bootstrap_cka(K, K, level=95)
