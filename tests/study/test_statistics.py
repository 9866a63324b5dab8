"""Intervals of paired differences, against textbook formulas, and in simulations: do they cover?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lit_cka.study.statistics import holm, paired_effect, pareto_front


def differences(seed: int, C: int, n: int) -> NDArray[np.int64]:
    """-1, 0 and 1, unrelated."""
    return np.random.default_rng(seed).integers(-1, 2, (C, n))


def test_one_set_of_single_samples_is_the_textbooks() -> None:
    d = differences(0, 7, 40) + np.arange(7)[:, None]
    effect = paired_effect([d])
    assert effect.mean == pytest.approx(d.mean(), abs=1e-15)
    for found, values in ((effect.over_samples, d.mean(axis=0)), (effect.over_models, d.mean(axis=1))):
        expected = stats.ttest_1samp(values, 0).confidence_interval()
        assert found == pytest.approx(tuple(expected), rel=1e-12)
    np.testing.assert_allclose(effect.by_model, d.mean(axis=1))


def test_several_sets_count_alike_and_their_samples_are_apart() -> None:
    parts = [differences(1, 5, 30), differences(2, 5, 200), differences(3, 5, 11)]
    effect = paired_effect(parts)
    assert effect.mean == pytest.approx(np.mean([part.mean() for part in parts]))
    assert effect.mean != pytest.approx(np.concatenate(parts, axis=1).mean(), abs=1e-3)
    # Of independent means the variances add up; the finite-sample factor is that of all units together.
    G = sum(part.shape[1] for part in parts)
    variance = sum(part.mean(axis=0).var() / part.shape[1] for part in parts) / 9 * G / (G - 1)
    half = stats.t.ppf(0.975, G - 1) * math.sqrt(variance)
    assert effect.over_samples == pytest.approx((effect.mean - half, effect.mean + half), rel=1e-12)


def test_versions_of_an_image_are_one_unit() -> None:
    """An image that is there four times, in two sets, is worth no more than one."""
    d = differences(4, 6, 50)
    once = paired_effect([d])
    numbers = np.arange(50)
    several = paired_effect([np.tile(d, (1, 3)), d[:, ::-1]], [np.tile(numbers, 3) + 7, numbers[::-1] + 7])
    for found, expected in zip(several[:4], once[:4], strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    apart = paired_effect([np.tile(d, (1, 3)), d[:, ::-1]])
    assert np.ptp(apart.over_samples) < 0.7 * np.ptp(once.over_samples)


def mean_squares(d: NDArray[np.float64]) -> tuple[float, float, float]:
    """A two-way analysis of variance without replication, by sums over cells."""
    C, n = d.shape
    grand, rows, columns = d.mean(), d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    of_rows = n * ((rows - grand) ** 2).sum() / (C - 1)
    of_columns = C * ((columns - grand) ** 2).sum() / (n - 1)
    return of_rows, of_columns, ((d - rows - columns + grand) ** 2).sum() / ((C - 1) * (n - 1))


def test_over_both_by_mean_squares() -> None:
    rng = np.random.default_rng(5)
    d = rng.normal(size=(6, 40)) + 0.5 * rng.normal(size=(6, 1)) + rng.normal(size=(1, 40))
    of_rows, of_columns, left = mean_squares(d)
    effect = paired_effect([d])
    q_C, q_G = stats.t.ppf(0.975, 5), stats.t.ppf(0.975, 39)
    half = math.sqrt(q_G**2 * of_columns / 240 + q_C**2 * (of_rows - left) / 240)
    assert effect.over_both == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-9)
    assert half > max(np.ptp(effect.over_samples), np.ptp(effect.over_models)) / 2


def test_the_p_value_belongs_to_the_interval() -> None:
    d = differences(6, 8, 60) + 0.2
    effect = paired_effect([d])
    assert 1e-6 < effect.p < 0.5
    low, high = paired_effect([d], level=1 - effect.p).over_both
    assert low == pytest.approx(0, abs=1e-8)
    assert high == pytest.approx(2 * effect.mean)
    mirrored = paired_effect([-d])
    assert (mirrored.mean, mirrored.p) == (pytest.approx(-effect.mean), pytest.approx(effect.p))


def test_nothing_different_is_no_effect_and_all_different_is_one() -> None:
    nothing = paired_effect([np.zeros((4, 9))])
    assert nothing[:5] == (0.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 1.0)
    assert (nothing.wins, nothing.ties) == (0, 4)
    always = paired_effect([np.ones((4, 9))])
    assert always.mean == 1
    assert always.over_both == (1.0, 1.0)
    assert always.p < 1e-9


def test_one_model_or_one_sample_leaves_half_of_it_open() -> None:
    one = paired_effect([differences(7, 1, 30)])
    assert np.isfinite(one.over_samples).all()
    assert np.isnan([*one.over_models, *one.over_both, one.p]).all()
    sample = paired_effect([differences(8, 5, 1)])
    assert np.isfinite(sample.over_models).all()
    assert np.isnan([*sample.over_samples, *sample.over_both, sample.p]).all()


def test_wrong_shapes_are_named() -> None:
    for wrong in ([], [np.zeros(3)], [np.zeros((2, 0))], [np.zeros((2, 3)), np.zeros((3, 3))]):
        with pytest.raises(ValueError, match=r"Expected `differences` \(models, samples\)"):
            paired_effect(wrong)
    with pytest.raises(ValueError, match=r"Expected `units` of each sample, \[\(3,\)\]"):
        paired_effect([np.zeros((2, 3))], [np.arange(4)])


def test_holm_by_hand() -> None:
    """Holm 1979: 0.01 x 4, 0.02 x 3, then 0.03 x 2 is not below what came before, nor is 0.5."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02, 0.03])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == pytest.approx([0.04, 0.04])


def test_pareto_front_by_hand() -> None:
    points = [(0, 3), (1, 2), (1, 1), (3, 0), (3, 0), (2, -1), (math.nan, 9)]
    assert pareto_front(points) == [True, True, False, True, True, False, False]


class Drawn:
    """Right answers of `shrink` and of edits that are worth the same, on the average over models and samples.

    A probit model: an answer is right if `ability + model + sample + noise > 0`. Each edit has random effects of its
    own, of the model, of the sample and of both, so that it differs from `shrink` on the models and samples of one
    study; where its ability is the same, it is a shrinkage in disguise.

    Args:
        of_models: spread of an edit's effects of models.
        of_samples: of samples, which come in three versions.
        of_both: of both.
    """

    def __init__(self, of_models: float, of_samples: float, of_both: float, *, C: int = 12, G: int = 120) -> None:
        self.spreads, self.C, self.G = (of_models, of_samples, of_both), C, G

    def differences(self, rng: np.random.Generator, ability: float, null: float) -> list[NDArray[np.int8]]:
        """By test set, an edit's answers minus those of `shrink` (models, samples)."""
        C, G = self.C, self.G
        common = 0.3 * rng.normal(size=(C, 1)) + 0.8 * rng.normal(size=(1, G))
        own = [sum(s * rng.normal(size=size) for s, size in zip(self.spreads, ((C, 1), (1, G), (C, G)), strict=True))
               for _ in range(2)]  # fmt: skip
        sets = []
        for _ in range(3):
            version = 0.5 * rng.normal(size=(C, G))
            right = [level + common + each + version + 0.3 * rng.normal(size=(C, G)) > 0
                     for level, each in zip((ability, null), own, strict=True)]  # fmt: skip
            sets.append(right[0].astype(np.int8) - right[1].astype(np.int8))
        return sets

    def truth(self, ability: float, null: float) -> float:
        """The mean difference over all models and samples."""
        spread = math.sqrt(0.3**2 + 0.8**2 + 0.5**2 + 0.3**2 + sum(each**2 for each in self.spreads))
        return float(stats.norm.cdf(ability / spread) - stats.norm.cdf(null / spread))


SPREADS = {
    "models": (0.2, 0.0, 0.1),
    "samples": (0.0, 0.3, 0.1),
    "both": (0.2, 0.3, 0.3),
    "left": (0.05, 0.1, 0.6),
    "noise": (0.0, 0.0, 0.3),
}


def simulate(
    spreads: tuple[float, float, float], num_studies: int, num_edits: int, **sizes: int
) -> tuple[float, float]:
    """Returns how often an interval over both covers the truth, and how often a study calls a disguised shrinkage
    more.
    """
    drawn, rng = Drawn(*spreads, **sizes), np.random.default_rng(0)
    units = [np.arange(drawn.G)] * 3
    covered, called = 0, 0
    for _ in range(num_studies):
        effects = [paired_effect(drawn.differences(rng, 0.8, 0.8), units) for _ in range(num_edits)]
        called += any(p < 0.05 and e.mean > 0 for p, e in zip(holm([e.p for e in effects]), effects, strict=True))
        better = paired_effect(drawn.differences(rng, 1.0, 0.8), units)
        covered += better.over_both[0] <= drawn.truth(1.0, 0.8) <= better.over_both[1]
    return covered / num_studies, called / num_studies


def test_intervals_cover_and_disguised_shrinkage_is_not_called_more() -> None:
    covered, called = simulate(SPREADS["both"], 120, 1)
    assert covered >= 0.9
    assert called <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("sizes", [{"C": 12, "G": 120}, {"C": 4, "G": 60}, {"C": 30, "G": 40}], ids=str)
def test_coverage_and_false_calls_of_400_studies(spreads: tuple[float, float, float], sizes: dict[str, int]) -> None:
    """Of five edits in each study, all of them shrinkage in disguise, and one that is better by 0.05 to 0.07."""
    covered, called = simulate(spreads, 400, 5, **sizes)
    assert 0.92 <= covered <= 0.995  # 0.95 within two standard errors of 400 studies, or conservative
    assert called <= 0.05


def test_samples_alone_would_not_cover() -> None:
    """Why models are drawn as well: the interval for these models misses the mean over all of them."""
    drawn, rng = Drawn(*SPREADS["models"]), np.random.default_rng(1)
    missed = 0
    for _ in range(60):
        low, high = paired_effect(drawn.differences(rng, 0.8, 0.8), [np.arange(drawn.G)] * 3).over_samples
        missed += not low <= 0 <= high
    assert missed > 20


def test_a_real_gain_is_seen() -> None:
    drawn, rng = Drawn(0.05, 0.1, 0.3), np.random.default_rng(2)
    effects = [paired_effect(drawn.differences(rng, 1.0, 0.8), [np.arange(drawn.G)] * 3) for _ in range(20)]
    assert sum(effect.p < 0.05 and effect.mean > 0 for effect in effects) >= 18
