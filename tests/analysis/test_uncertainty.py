"""Intervals of every pair of layers: against those of one pair by hand, and how often they cover."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_cka.analysis import Features, Settings, compare_features, uncertainty
from lit_cka.analysis.comparison import Comparison
from lit_cka.functional import cka_from_gram, cka_interval, jackknife_cka, rbf_gram
from tests import oracles
from tests.oracles import paired_features

KERNELS = pytest.mark.parametrize("measure", ["cka", "rbf_cka"])
GRAMS: dict[str, Any] = {"cka": oracles.linear_gram, "rbf_cka": oracles.rbf_gram}


def models(n: int) -> tuple[Features, Features]:
    """Of three and two layers, off centre, some pairs of them unrelated."""
    a, b = {}, {}
    for number, d in enumerate((4, 30, 3)):
        a[f"a{number}"], other = paired_features(n, d, 5, seed=number)
        if number:
            b[f"b{number}"] = other
    ids = [str(index) for index in range(n)]
    return Features(a, ids, "a"), Features(b, ids, "b")


def bounds(found: Comparison) -> np.ndarray:
    assert found.low is not None
    assert found.high is not None
    return np.stack([found.low, found.high])


def by_hand(X: Tensor, Y: Tensor, settings: Settings) -> list[float]:
    n = len(X)
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))[:512].numpy()
    gram = GRAMS[settings.measure]
    cka = torch.tensor(oracles.cka(gram(X.numpy()), gram(Y.numpy()), True), dtype=torch.float64)
    H = np.eye(len(drawn)) - 1 / len(drawn)
    K, L = (torch.from_numpy(H @ gram(each.numpy()[drawn]) @ H) for each in (X, Y))
    return [end.item() for end in cka_interval(cka, n, jackknife_cka(K, L), settings.level)]


@KERNELS
@pytest.mark.parametrize(("debiased", "level"), [(True, 0.95), (False, 0.8)])
def test_they_are_those_of_each_pair(measure: Any, debiased: bool, level: float) -> None:
    a, b = models(40)
    settings = Settings(measure, debiased=debiased, level=level)
    ends = bounds(compare_features(a, b, settings))
    assert ends.shape == (2, 3, 2)
    assert ends.dtype == np.float64
    for (i, X), (j, Y) in product(enumerate(a.layers.values()), enumerate(b.layers.values())):
        assert ends[:, i, j].tolist() == pytest.approx(by_hand(X, Y, settings), abs=1e-8)
    values = compare_features(a, b, Settings(measure)).values
    assert (ends[0] < values).all()
    assert (values < ends[1]).all()


def test_a_wide_rbf_kernel_has_the_intervals_of_the_linear_one() -> None:
    """All of it is 1 but for some 1e-8, which is not rounding."""
    a, b = models(30)
    wide = bounds(compare_features(a, b, Settings("rbf_cka", bandwidth=3e3)))
    np.testing.assert_allclose(wide, bounds(compare_features(a, b)), rtol=0, atol=1e-5)


@KERNELS
def test_of_more_samples_512_are_drawn(measure: Any) -> None:
    X, Y = paired_features(520, 4, 5)
    a, b = (Features({"layer": each}, [str(index) for index in range(520)]) for each in (X, Y))
    settings = Settings(measure, seed=3)
    found = bounds(compare_features(a, b, settings)).flatten().tolist()
    assert found == pytest.approx(by_hand(X, Y, settings), abs=1e-8)
    assert found != pytest.approx(by_hand(X, Y, replace(settings, seed=4)), abs=1e-8)


def test_they_are_about_the_debiased_estimate_though_the_plain_one_is_outside() -> None:
    """Wide features of few samples look alike to the plain estimator, whatever they are."""
    X, Y = paired_features(20, 300, 300, related=False)
    a, b = (Features({"layer": each}, [str(index) for index in range(20)]) for each in (X, Y))
    plain = compare_features(a, b, Settings(debiased=False))
    low, high = bounds(plain).flatten()
    assert low < 0.05
    assert high < 0.5
    assert plain.values.item() > 0.7
    assert np.array_equal(bounds(plain), bounds(compare_features(a, b)))


def test_samples_are_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "SIZE", 40)
    state = torch.random.get_rng_state()
    for n, depends in ((40, False), (41, True)):
        a, b = models(n)
        first, again, other = (bounds(compare_features(a, b, Settings(seed=seed))) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert np.array_equal(first, other) != depends
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_part_of_the_samples_gives_about_the_width_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = models(400)
    of_all = bounds(compare_features(a, b))
    monkeypatch.setattr(uncertainty, "SIZE", 200)
    of_part = bounds(compare_features(a, b))
    assert not np.array_equal(of_part, of_all)
    np.testing.assert_allclose(of_part[1] - of_part[0], of_all[1] - of_all[0], rtol=0.3)


@KERNELS
@pytest.mark.parametrize("debiased", [True, False])
def test_a_model_with_itself(measure: Any, debiased: bool) -> None:
    a, _ = models(20)
    settings = Settings(measure, debiased=debiased)
    ends = bounds(compare_features(a, a, settings))
    np.testing.assert_allclose(ends[:, range(3), range(3)], 1.0, rtol=0, atol=1e-12)
    assert np.array_equal(ends, ends.swapaxes(1, 2))
    assert (ends[0] < ends[1])[~np.eye(3, dtype=bool)].all()
    copied = replace(a, model="copy", layers={name: 3 * X + 1 for name, X in a.layers.items()})
    np.testing.assert_allclose(bounds(compare_features(a, copied, settings)), ends, rtol=0, atol=1e-8)


@KERNELS
@pytest.mark.parametrize("debiased", [True, False])
def test_dead_layers_have_none(measure: Any, debiased: bool) -> None:
    a, b = models(12)
    outlier = torch.zeros(12, 3, dtype=torch.float64)
    outlier[5] = 1  # without this sample, nothing varies
    equal = torch.full((12, 4), 0.1, dtype=torch.float64) * 3e4
    a = replace(a, layers={**a.layers, "dead": equal, "outlier": outlier})
    settings = Settings(measure, debiased=debiased)
    undefined = np.isnan(bounds(compare_features(a, b, settings)))
    assert undefined[:, 3:].all()
    assert not undefined[:, :3].any()
    assert np.isnan(bounds(compare_features(b, a, settings))[..., 3:]).all()


@KERNELS
@pytest.mark.parametrize("debiased", [True, False])
def test_they_take_eight_samples(measure: Any, debiased: bool) -> None:
    settings = Settings(measure, debiased=debiased)
    found = compare_features(*models(7), settings)
    assert found.low is found.high is None
    assert np.isfinite(found.values).all()
    assert bounds(compare_features(*models(8), settings)).shape == (2, 3, 2)


def test_other_measures_have_none_and_they_can_be_left_out() -> None:
    for settings in (Settings("rsa"), Settings("sampled_features_cka"), Settings(intervals=False)):
        found = compare_features(*models(12), settings)
        assert found.low is found.high is None


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.05, 1.0, 4.0, 30.0])
def test_rbf_intervals_cover_what_very_many_samples_have(noise: float) -> None:
    """Of 200 draws: RBF CKA has no closed form."""

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        X, Z = torch.randn(2, n, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        scales = torch.arange(1, 11, dtype=torch.float64) ** -0.5
        return X * scales + 3, (X + noise * Z) * scales - 2

    K, L = (rbf_gram(each) for each in draw(4_000, 1_000))
    population = cka_from_gram(K, L, debiased=True).item()
    covered = 0
    for seed in range(200):
        ids = [str(index) for index in range(60)]
        X, Y = (Features({"layer": each}, ids) for each in draw(60, seed))
        low, high = bounds(compare_features(X, Y, Settings("rbf_cka"))).flatten()
        covered += low <= population <= high
    print(f"RBF CKA {population:.4f}: {covered} of 200")
    assert 180 <= covered <= 198
