"""How many samples it takes: against what so many samples then give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_cka.functional import cka_interval, linear_cka, linear_jackknife, plan_samples
from tests.oracles import paired_features


def draw(n: int, seed: int, cka: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X, Z = (torch.randn(n, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    spectrum = torch.arange(1, 13, dtype=torch.float64) ** -0.5
    return X * spectrum + 4, (math.sqrt(cka) * X + math.sqrt(1 - cka) * Z) * spectrum - 1


@pytest.mark.parametrize("cka", [0.1, 0.6, 0.97])
def test_so_many_samples_give_what_was_asked_for(cka: float) -> None:
    width = 0.02 if cka == 0.97 else 0.1
    plan = plan_samples(*draw(600, 0, cka), width=width)
    assert plan.n is not None
    widths, bias = [], []
    for seed in range(1, 13):
        X, Y = draw(plan.n, seed, cka)
        samples = linear_jackknife(X[:500], Y[:500])
        cka_of_draw = linear_cka(X, Y, debiased=True)
        low, high = cka_interval(cka_of_draw, plan.n, samples)
        widths.append((high - low).item())
        bias.append((linear_cka(X, Y) - cka_of_draw).item())
    assert sum(widths) / len(widths) == pytest.approx(width, rel=0.2)
    assert plan.low < cka < plan.high
    assert plan.plain - plan.cka == pytest.approx(sum(bias) / len(bias), rel=0.25)


def test_the_bias_of_few_samples() -> None:
    """A pilot of many samples knows what the plain estimator makes of few, wide ones."""
    X, Y = draw(2000, 0, 0.3)
    plan = plan_samples(X, Y, width=0.6)
    assert plan.n is not None
    assert plan.n < 40
    plain = [linear_cka(*draw(plan.n, seed, 0.3)).item() for seed in range(1, 200)]
    assert plan.plain == pytest.approx(sum(plain) / len(plain), abs=0.03)
    assert plan.plain > plan.cka + 0.03


def test_a_narrower_interval_takes_more_samples() -> None:
    X, Y = draw(200, 3)
    needed = [plan_samples(X, Y, width=width).n for width in (0.2, 0.1, 0.05, 0.025)]
    assert needed == sorted(needed)
    for more, fewer in zip(needed[1:], needed, strict=False):
        assert 3 < more / fewer < 5  # as 1 / n, but for what pairs add


def test_what_can_not_be_planned() -> None:
    X, Y = paired_features(30, 4, 4)
    assert plan_samples(X, torch.ones_like(Y)).n is None
    assert math.isnan(plan_samples(X, torch.ones_like(Y)).plain)
    assert plan_samples(X, 2 * X + 1).n == 20  # the same features, an interval of 0: the fewest
    with pytest.raises(ValueError, match="at least 8 samples, but got 5"):
        plan_samples(X[:5], Y[:5])
    with pytest.raises(ValueError, match="`width` to be between 0 and 2, but got 0"):
        plan_samples(X, Y, width=0)
    with pytest.raises(ValueError, match="`level` to be between 0 and 1, but got 95"):
        plan_samples(X, Y, level=95)
