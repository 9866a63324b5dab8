"""The jackknife and its intervals: against loops, against other solvers, and how often they cover."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import t as student
from torch import Tensor

from lit_cka.functional import (
    change_interval,
    cka_interval,
    jackknife_cka,
    linear_cka,
    linear_gram,
    linear_jackknife,
    rbf_gram,
)
from lit_cka.functional.centring import double_centred
from lit_cka.functional.jackknife import MIN_SAMPLES, Jackknife, SampledGram, pair_jackknife, u_centred
from tests import oracles
from tests.oracles import paired_features


def without(X: Tensor, i: int) -> Tensor:
    return torch.cat([X[:i], X[i + 1 :]])


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(8, 3, 2), (15, 4, 40), (40, 6, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_value_is_that_of_the_other_samples(n: int, d_x: int, d_y: int, dtype: torch.dtype) -> None:
    X, Y = paired_features(n, d_x, d_y, offset=3.0, dtype=dtype)
    samples = linear_jackknife(X, Y)
    assert samples.value.item() == pytest.approx(oracles.linear_cka(X, Y, True), abs=1e-12)
    by_hand = [oracles.linear_cka(without(X, i), without(Y, i), True) for i in range(n)]
    assert samples.without.tolist() == pytest.approx(by_hand, abs=1e-12)


def test_any_kernel() -> None:
    X, Y = paired_features(12, 3, 3)
    K, L = rbf_gram(X), rbf_gram(Y)
    by_hand = []
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        by_hand.append(oracles.cka(K[rest][:, rest].numpy(), L[rest][:, rest].numpy(), True))
    assert jackknife_cka(K, L).without.tolist() == pytest.approx(by_hand, abs=1e-10)


def test_the_variance_of_pairs_is_that_of_their_contributions() -> None:
    n = 11
    X, Y = paired_features(n, 4, 3)
    K, L = (oracles.linear_gram(features.numpy()) for features in (X, Y))

    def u_centred(K: np.ndarray) -> np.ndarray:  # Szekely & Rizzo 2014, eq. 2.8, element by element
        K, A = K - np.diag(np.diag(K)), np.zeros((n, n))
        for i, j in product(range(n), range(n)):
            if i != j:
                A[i, j] = K[i, j] - K[i].sum() / (n - 2) - K[:, j].sum() / (n - 2) + K.sum() / ((n - 1) * (n - 2))
        return A

    A, B = u_centred(K), u_centred(L)
    x, y, T = (A * A).sum(), (B * B).sum(), oracles.linear_cka(X, Y, True)
    assert pytest.approx((A * B).sum() / math.sqrt(x * y), abs=1e-12) == T
    Q = n * (n - 3) * (A * B / math.sqrt(x * y) - T / 2 * (A * A / x + B * B / y))
    samples = linear_jackknife(X, Y)
    assert samples.pairs.item() == pytest.approx(max(oracles.unbiased_hsic(Q, Q), 0), rel=1e-9)
    largest = [np.abs(np.linalg.eigvalsh(each)).max() / np.linalg.norm(each) for each in (A, B)]
    assert samples.concentration.item() == pytest.approx(math.prod(largest), rel=0.05)


def test_inner_products_of_u_centred_matrices_are_the_unbiased_hsic() -> None:
    n, K, L = 9, *(linear_gram(each) for each in paired_features(9, 4, 3))
    A, B = u_centred(K), u_centred(L)
    assert (A * B).sum().item() == pytest.approx(n * (n - 3) * oracles.unbiased_hsic(K.numpy(), L.numpy()), rel=1e-12)
    assert A.diagonal().count_nonzero() == 0
    assert A.sum(0).abs().max() < 1e-12
    equidistant = torch.eye(n, dtype=torch.float64) - 1 / n
    together = u_centred(torch.stack([equidistant, K]))
    assert together[0].count_nonzero() == 0  # not rounding, whose cosines would be anything
    assert torch.equal(together[1], A)


def test_a_gram_matrix_is_prepared_once_for_all_its_pairs() -> None:
    (X, Y), (Z, _) = paired_features(12, 4, 3), paired_features(12, 5, 3, seed=1)
    x = SampledGram(linear_gram(X))
    for other in (Y, Z, X):
        for one, two in zip(
            pair_jackknife(x, SampledGram(linear_gram(other))), linear_jackknife(X, other), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def interval_by_hand(cka: float, n: int, samples: Jackknife) -> tuple[float, float]:
    """The roots of the equation in the docstring of `cka_interval`, by Brent's method."""
    m, T, tau2 = len(samples.without), samples.value.item(), samples.pairs.item()
    phi = -np.log(1 - samples.without.numpy())
    V = (m - 1) / m * ((phi - phi.mean()) ** 2).sum()
    pairs = 2 * tau2 / m**2 / (1 - T) ** 2
    single, c0 = max(V - 2 * pairs, 0), 2 * tau2 / (n * (1 - T)) ** 2
    prior = math.sqrt(2 * tau2) / m
    deviations = phi - phi.mean()
    kurtosis = (deviations**4).mean() / (deviations**2).mean() ** 2
    single *= 1 + math.sqrt((kurtosis - 1) * (1 / m - 1 / n))
    c1 = (single + prior * 4 / m * samples.concentration.item()) / (max(T, 0) + prior) * m / n
    q = student.ppf(0.975, min(max(2 * m / (kurtosis - 1), 2.5), m - 1))

    def gap(t: float, sign: int) -> float:
        return sign * (math.log(1 - cka) - math.log(1 - t)) - q * math.sqrt(c0 + c1 * max(t, 0))

    return brentq(gap, -1, cka, args=(-1,)), brentq(gap, cka, 1 - 1e-12, args=(1,))


@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize("n", [30, 900])
def test_the_interval_solves_its_equation(n: int, related: bool) -> None:
    X, Y = paired_features(30, 5, 4, related=related, seed=3)
    samples = linear_jackknife(X, Y)
    cka = samples.value + 0.01
    low, high = cka_interval(cka, n, samples)
    assert (low.item(), high.item()) == pytest.approx(interval_by_hand(cka.item(), n, samples), abs=1e-9)


def test_layers_at_once_are_layers_one_by_one() -> None:
    X, Y = (
        torch.stack(each) for each in zip(*(paired_features(20, 5, 4, seed=seed) for seed in range(6)), strict=True)
    )
    X, Y = X.reshape(2, 3, 20, 5), Y.reshape(2, 3, 20, 4)
    together = linear_jackknife(X, Y)
    ends = cka_interval(together.value, torch.full((2, 3), 20), together)
    for i, j in product(range(2), range(3)):
        alone = linear_jackknife(X[i, j], Y[i, j])
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i, j], one, rtol=1e-12, atol=1e-12)
        for whole, one in zip(ends, cka_interval(alone.value, 20, alone), strict=True):
            torch.testing.assert_close(whole[i, j], one, rtol=1e-9, atol=1e-9)


def test_it_does_not_depend_on_rotation_scale_offset_or_order() -> None:
    X, Y = paired_features(25, 4, 6)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
    base, other = linear_jackknife(X, Y), linear_jackknife(1e75 * (X[order] @ rotation + 5), 1e-75 * Y[order])
    torch.testing.assert_close(other.without, base.without[order], rtol=1e-9, atol=1e-9)
    for one, two in zip(cka_interval(base.value, 25, base), cka_interval(other.value, 25, other), strict=True):
        assert one.item() == pytest.approx(two.item(), abs=1e-8)


def test_what_is_the_same_has_no_error_and_what_is_undefined_no_interval() -> None:
    X, Y = paired_features(20, 5, 5)
    same = linear_jackknife(X, 3 * X + 1)
    assert [end.item() for end in cka_interval(same.value, 20, same)] == pytest.approx([1, 1], abs=1e-11)
    constant, nan = torch.ones_like(X), Y.clone()
    nan[3] = torch.nan
    outlier = torch.zeros_like(X)
    outlier[0] = 1  # without this sample, nothing varies
    for A, B in ((X, constant), (X, nan), (outlier, Y)):
        samples = linear_jackknife(A, B)
        assert all(end.isnan() for end in cka_interval(samples.value, 20, samples))
    with pytest.raises(ValueError, match=f"at least {MIN_SAMPLES} samples for an interval of CKA, but got 7"):
        linear_jackknife(X[:7], Y[:7])


def test_nearly_equidistant_samples_have_no_interval_rather_than_one_of_no_width() -> None:
    """From where on nothing but rounding is left, all is undefined."""
    noise = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-9, -5, 40, dtype=torch.float64)[:, None, None]
    K = double_centred(torch.eye(20, dtype=torch.float64) + sizes * (noise + noise.T))
    L = linear_gram(paired_features(20, 4, 3)[0]).expand_as(K)
    samples = jackknife_cka(K, L)
    low, high = cka_interval(samples.value, 20, samples)
    is_told = samples.value.isfinite()
    assert torch.equal(is_told.sort().values, is_told)
    assert 10 < is_told.sum() < 30
    assert torch.equal(low + 0.1 < high, is_told)
    assert torch.equal(samples.without.isfinite().all(-1), is_told)


def test_a_change_is_told_where_intervals_overlap() -> None:
    """Paired: what is peculiar to a sample is so in both."""
    X, Y = paired_features(200, 6, 6)
    noise = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before, now = linear_jackknife(X, Y), linear_jackknife(X, Y + 0.7 * noise)
    ends = [cka_interval(each.value, 200, each) for each in (before, now)]
    assert ends[1][1] > ends[0][0]  # they overlap
    low, high = change_interval(now.value, before.value, 200, (now.without, before.without))
    assert low < high < 0
    assert (low + high).item() / 2 == pytest.approx((now.value - before.value).item())
    difference = (now.without - before.without).numpy()
    error = math.sqrt(199 / 200 * ((difference - difference.mean()) ** 2).sum())
    assert (high - low).item() / 2 / error == pytest.approx(1.97, abs=0.1)


def trainings(n: int, d: int, cka: float, count: int, *, decay: float, heavy: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Features (count, n, d) of `count` trainings whose population CKA is known: `Y = rho X + sqrt(1 - rho^2) Z`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    X, Z = randn(count, n, d), randn(count, n, d)
    if heavy:  # of all directions at once: t with 6 degrees of freedom, and the same CKA
        scale = randn(count, n, 6).square().mean(-1, keepdim=True).rsqrt()
        X, Z = X * scale, Z * scale
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    return X * spectrum + 3, (math.sqrt(cka) * X + math.sqrt(1 - cka) * Z) * spectrum - 2


def coverage(n: int, d: int, cka: float, count: int, *, decay: float, heavy: bool) -> float:
    hits = 0
    for seed in range(-(-count // 50)):
        X, Y = trainings(n, d, cka, 50, decay=decay, heavy=heavy, seed=seed)
        m = min(n, 256)
        samples = linear_jackknife(X[:, :m], Y[:, :m])
        values = torch.stack([linear_cka(x, y, debiased=True) for x, y in zip(X, Y, strict=True)])
        low, high = cka_interval(values, n, samples)
        hits += int(((low <= cka) & (cka <= high)).sum())
    return hits / (50 * -(-count // 50))


@pytest.mark.parametrize("cka", [0.05, 0.5, 0.99])
@pytest.mark.parametrize(("d", "decay"), [(10, 1.0), (75, 0.0)])
def test_it_covers(d: int, decay: float, cka: float) -> None:
    assert 0.9 <= coverage(50, d, cka, 200, decay=decay, heavy=False) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("cka", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("width", ["narrow", "wide"])
@pytest.mark.parametrize("n", [50, 200, 2000])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "t6"])
def test_it_covers_the_population_in_92_to_98_of_100(n: int, width: str, decay: float, cka: float, heavy: bool) -> None:
    """Of 400 trainings; two standard errors of such a share are 2 %."""
    d = 10 if width == "narrow" else {50: 75, 200: 300, 2000: 2400}[n]
    count = 400 if n * d < 1e6 else 100
    margin = 0.02 if count == 400 else 0.04
    assert 0.92 - margin <= coverage(n, d, cka, count, decay=decay, heavy=heavy) <= 0.98 + margin
