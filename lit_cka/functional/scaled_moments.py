"""Moments of features in a unit of their own: exact at any scale, over batches and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, add_samples, merge_moments, scaled_moments
from lit_cka.functional.precision import Products, as_float64
from lit_cka.functional.units import common_exponent, exponents_of, in_unit


class ScaledMoments(NamedTuple):
    """Moments of `x / 2^exponent_x` and `y / 2^exponent_y`, see `lit_cka.functional.units`.

    The exponents are those of the first batch in which the features varied: none changes by a factor of 2^200 later.
    """

    moments: PairedMoments
    exponent_x: Tensor  # ()
    exponent_y: Tensor  # ()

    def in_units(self, exponent_x: Tensor, exponent_y: Tensor) -> ScaledMoments:
        """Returns the moments of the same samples in units with these exponents."""
        moments, unit_x, unit_y = self
        if unit_x == exponent_x and unit_y == exponent_y:
            return self
        s, t = torch.exp2(unit_x - exponent_x), torch.exp2(unit_y - exponent_y)
        # Where nothing varies, sums are 0, which no power of s may turn into 0 times infinity.
        scaled = scaled_moments(moments, s.where(moments.a != 0, 1.0), t.where(moments.b != 0, 1.0))
        return ScaledMoments(
            scaled._replace(mean_x=moments.mean_x * s, mean_y=moments.mean_y * t), exponent_x, exponent_y
        )


def add_scaled(state: ScaledMoments, X: Tensor, Y: Tensor, *, products: Products | None = None) -> ScaledMoments:
    """Returns the moments with a batch more, `X` (n, d_x) and `Y` (n, d_y); see `add_samples`."""
    x, y = as_float64(X), as_float64(Y)
    moments, unit_x, unit_y = state
    # Of features that have not varied yet there is but a mean: it takes on any unit.
    i, j = (
        torch.where(spread == 0, exponents_of(features), unit)
        for spread, features, unit in ((moments.a, x, unit_x), (moments.b, y, unit_y))
    )
    moments = moments._replace(
        mean_x=moments.mean_x * torch.exp2(unit_x - i), mean_y=moments.mean_y * torch.exp2(unit_y - j)
    )
    return ScaledMoments(add_samples(moments, in_unit(x, i), in_unit(y, j), products=products), i, j)


def merge_scaled(first: ScaledMoments, second: ScaledMoments) -> ScaledMoments:
    """Returns the moments of the union of two disjoint sets of samples."""
    both = (first, second)
    a, b = (torch.stack([getattr(each.moments, name) for each in both]) for name in "ab")
    i = common_exponent(torch.stack([each.exponent_x for each in both]), a)
    j = common_exponent(torch.stack([each.exponent_y for each in both]), b)
    return ScaledMoments(merge_moments(first.in_units(i, j).moments, second.in_units(i, j).moments), i, j)
