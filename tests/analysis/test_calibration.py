"""Calibrated scores: every measure against a loop over permutations, and uniform p-values where nothing is shared."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest
from torch import Tensor

from lit_cka.analysis.calibration import Calibration, calibrate
from lit_cka.analysis.measures import similarity
from lit_cka.analysis.permuted import permuted_similarity
from lit_cka.analysis.settings import WITH_MOMENTS, Measure, Settings
from lit_cka.functional.permutations import draw_orders

# All measures, and the branches within them.
CASES: dict[str, dict[str, Any]] = {measure: {"measure": measure} for measure in get_args(Measure)}
CASES |= {
    "cka, plain": {"measure": "cka", "debiased": False},
    "rbf_cka, plain": {"measure": "rbf_cka", "debiased": False},
    "rsa, pearson": {"measure": "rsa", "comparison": "pearson", "distance": "euclidean"},
    "rsa, kendall": {"measure": "rsa", "comparison": "kendall"},
}
CASES["minibatch_cka"]["batch_size"] = 6
EVERY = pytest.mark.parametrize("case", CASES)


def layers(n: int, widths: tuple[int, ...], shared: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Off-centre layers that build on each other, as those of a network; `shared` is what two models have in common."""
    rng = np.random.default_rng(seed)
    x = shared * np.random.default_rng(99).standard_normal((n, 3)) + rng.standard_normal((n, 3))
    found = []
    for width in widths:
        x = np.tanh(x @ rng.standard_normal((x.shape[1], width))) + 0.3 * rng.standard_normal((n, width))
        found.append(torch.from_numpy(x + 3 * rng.standard_normal(width)))
    return found


def settings_of(case: str, **more: Any) -> Settings:
    return Settings(**{"num_neighbours": 3, "num_permutations": 19, **CASES[case], **more})


@EVERY
def test_permuted_scores_are_those_of_permuted_features(case: str) -> None:
    Xs, Ys, settings = layers(16, (4, 20)), layers(16, (6, 3, 5), seed=1), settings_of(case)
    Ys[2] = torch.ones_like(Ys[2])  # a constant layer
    orders = draw_orders(16, 5, seed=0)
    found = permuted_similarity(Xs, Ys, settings, orders)
    assert found.shape == (5, 2, 3)
    for values, order in zip(found, orders, strict=True):
        expected = similarity(Xs, [Y[order] for Y in Ys], settings)
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-7, equal_nan=True)
    assert found[:, :, 2].isnan().all()
    assert (found[:, :, 0].std(dim=0) > 1e-6).all() or settings.measure == "pwcca"


@EVERY
def test_calibration_is_a_loop_over_permutations(case: str) -> None:
    Xs, Ys = layers(14, (3, 4), shared=1.5), layers(14, (5, 3, 6), shared=1.5, seed=1)
    settings = settings_of(case, seed=2, level=0.8)
    values = similarity(Xs, Ys, settings)
    found = calibrate(Xs, Ys, values, settings)
    sign = -1 if case == "procrustes" else 1
    orders = draw_orders(14, 19, seed=2)
    null = sign * np.stack([similarity(Xs, [Y[order] for Y in Ys], settings).numpy() for order in orders])
    scores, equal = sign * values.numpy(), 0 if case == "procrustes" else 1
    reached = null >= scores - 1e-6
    np.testing.assert_allclose(found.p_values, (1 + reached.sum(0)) / 20)
    best = null.max(axis=(1, 2))
    adjusted = (1 + np.sum(best[:, None, None] >= scores - 1e-6, axis=0)) / 20
    np.testing.assert_allclose(found.adjusted_p_values, adjusted)
    threshold = np.sort(np.concatenate([null, scores[None]]), axis=0)[15]  # the 16th of 20: 80 %
    np.testing.assert_allclose(found.thresholds, sign * threshold, atol=2e-7)
    np.testing.assert_allclose(found.excess, np.clip((scores - threshold) / (equal - threshold), 0, None), atol=2e-6)
    assert found.best is not None
    place = np.unravel_index(scores.argmax(), scores.shape)
    assert (found.best.row, found.best.column) == place
    assert found.best.p_value == pytest.approx(adjusted[place])
    limit = np.sort([*best, scores.max()])[15]
    assert found.best.excess == pytest.approx(max(0, (scores.max() - limit) / (equal - limit)), abs=2e-6)


@EVERY
def test_equal_features_are_at_one_and_chance_at_zero(case: str) -> None:
    Xs, Ys = layers(40, (3, 4)), layers(40, (3, 4), seed=1)
    settings = settings_of(case)
    same = calibrate(Xs, Xs, similarity(Xs, Xs, settings), settings)
    np.testing.assert_allclose(np.diagonal(same.excess), 1, atol=1e-6)
    np.testing.assert_allclose(np.diagonal(same.p_values), 0.05)
    assert same.best is not None
    assert same.best.row != same.best.column
    other = calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings)
    assert np.median(other.excess) < 0.1


def test_undefined_layers_stay_out_of_it() -> None:
    Xs, Ys, settings = layers(30, (3, 4)), layers(30, (5, 3), seed=1), Settings(num_permutations=19)
    expected = calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings)
    constant = [*Xs, torch.ones(30, 2, dtype=torch.float64)]
    for null in ("permutations", "moments"):
        settings = Settings(num_permutations=19, null=null)
        found = calibrate(constant, Ys, similarity(constant, Ys, settings), settings)
        for name in ("p_values", "adjusted_p_values", "thresholds", "excess"):
            assert np.isnan(getattr(found, name)[2]).all()
            assert np.isfinite(getattr(found, name)[:2]).all()
            if null == "permutations":
                np.testing.assert_allclose(getattr(found, name)[:2], getattr(expected, name))
    nothing = calibrate(constant[2:], Ys, similarity(constant[2:], Ys, settings), settings)
    assert nothing.best is None


def test_no_room_above_chance() -> None:
    """With fewer samples than directions every permutation has the PWCCA 1: it is all chance."""
    Xs, settings = layers(8, (20,)), Settings("pwcca", num_permutations=19)
    Ys = layers(8, (30,), seed=1)
    found = calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings)
    assert found.p_values.item() == 1
    assert found.excess.item() == 0
    equidistant = [torch.eye(8, dtype=torch.float64)]
    for null in ("permutations", "moments"):
        settings = Settings(debiased=False, num_permutations=19, null=null)
        found = calibrate(equidistant, Ys, similarity(equidistant, Ys, settings), settings)
        assert found.p_values.item() == 1  # all orders are alike
        assert found.excess.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("measure", WITH_MOMENTS)
@pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
def test_moments_are_many_permutations(measure: Any, debiased: bool) -> None:
    n = 30
    Xs, Ys = layers(n, (3, 12), shared=0.4), layers(n, (5, 40), shared=0.4, seed=1)
    drawn, closed = (
        calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings)
        for settings in (
            Settings(measure, debiased=debiased, num_permutations=3000),
            Settings(measure, debiased=debiased, null="moments"),
        )
    )
    np.testing.assert_allclose(closed.p_values, drawn.p_values, atol=0.02)
    spread = (similarity(Xs, Ys, Settings(measure, debiased=debiased)).numpy() - drawn.thresholds).std()
    np.testing.assert_allclose(closed.thresholds, drawn.thresholds, atol=0.02 + 0.1 * spread)
    np.testing.assert_allclose(closed.adjusted_p_values, np.clip(4 * closed.p_values, 0, 1))
    assert closed.best is not None
    assert drawn.best is not None
    assert (closed.best.row, closed.best.column) == (drawn.best.row, drawn.best.column)
    assert closed.best.p_value >= drawn.best.p_value - 0.02


def test_moments_need_six_samples() -> None:
    Xs, settings = layers(5, (3,)), Settings(null="moments")
    with pytest.raises(ValueError, match="at least 6 samples"):
        calibrate(Xs, Xs, similarity(Xs, Xs, settings), settings)


def unrelated(case: str, draws: int, n: int, **more: Any) -> list[Calibration]:
    found = []
    for seed in range(draws):
        Xs, Ys = layers(n, (4, 6, 5), seed=2 * seed), layers(n, (3, 8), seed=2 * seed + 1)
        settings = settings_of(case, seed=seed, **more)
        found.append(calibrate(Xs, Ys, similarity(Xs, Ys, settings), settings))
    return found


def check_uniform(p_values: list[float], num_permutations: int | None) -> None:
    """By Kolmogorov and Smirnov, at a level of 1 in 1,000; p-values of permutations are spread over their step."""
    p = np.array(p_values)
    if num_permutations is not None:
        p = p - np.random.default_rng(0).random(len(p)) / (num_permutations + 1)
    assert kstest(p, "uniform").pvalue > 0.001
    assert np.mean(np.array(p_values) <= 0.05) <= binom.ppf(0.999, len(p), 0.05) / len(p)


@pytest.mark.parametrize("case", ["cka", "procrustes", "rsa", "svcca", "cknna"])
def test_p_values_are_uniform_where_nothing_is_shared(case: str) -> None:
    found = unrelated(case, draws=80, n=14)
    check_uniform([each.p_values[1, 1] for each in found], 19)
    check_uniform([each.best.p_value for each in found if each.best], 19)
    assert np.mean([each.adjusted_p_values[1, 1] for each in found]) > 0.6


TIED = ("mutual_knn",)  # few values: p-values are larger than uniform


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("minibatch_cka", "rsa, kendall")])
def test_p_values_are_calibrated(case: str) -> None:
    """400 draws: that of a pair, and of the best of all pairs, at most 5 % below 0.05 within binomial error."""
    found = unrelated(case, draws=400, n=30, num_permutations=199)
    for p_values in ([each.p_values[1, 1] for each in found], [each.best.p_value for each in found if each.best]):
        assert len(p_values) == 400
        below = np.mean(np.array(p_values) <= 0.05)
        print(f"{case}: {below:.3f} at most 0.05, KS p = {kstest(p_values, 'uniform').pvalue:.3f}")
        if case in TIED:
            assert below <= binom.ppf(0.999, 400, 0.05) / 400
        else:
            check_uniform(p_values, 199)
            assert below >= binom.ppf(0.001, 400, 0.05) / 400


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cka", "cka, plain", "rbf_cka", "sampled_features_cka"])
def test_p_values_of_moments_are_calibrated(case: str) -> None:
    found = unrelated(case, draws=400, n=30, num_permutations=0, null="moments")
    p_values = [each.p_values[1, 1] for each in found]
    best = np.array([each.best.p_value for each in found if each.best])
    print(f"{case}: {np.mean(np.array(p_values) <= 0.05):.3f}, best {np.mean(best <= 0.05):.3f}")
    check_uniform(p_values, None)
    assert np.mean(best <= 0.05) <= binom.ppf(0.999, 400, 0.05) / 400  # Bonferroni: no more than that


def test_too_few_permutations_have_no_quantile() -> None:
    """The largest of all is the quantile then, the observed score if that is it: nothing is above chance."""
    Xs, settings = layers(30, (3,)), Settings(num_permutations=9)
    found = calibrate(Xs, Xs, similarity(Xs, Xs, settings), settings)
    assert found.excess.item() == 0
    assert found.p_values.item() == 0.1
    assert math.isclose(found.thresholds.item(), 1, abs_tol=1e-6)
