"""The mean of paired differences over models and samples, with intervals for other samples, other models, and both.

A model `c` of `C` gets sample `s` right (1) or wrong (0), before and after a change; `d_cs` is the difference. On a
test set, `theta_c` is the mean of `d_cs` over its samples, and over several test sets the mean of that. What is
estimated is

    theta = mean_c theta_c

Samples made from one original (an image in several versions) are one unit `u` of `G`. With `n_t` samples in the test
set `t` of `T`, the influence of a unit on `theta_c` (a linearised mean, by clusters) is

    phi_cu = 1 / T sum_t 1 / n_t sum_{s in t and u} (d_cs - mean_t d_cs)

In a crossed design with random models, random units and what is left of both (Cornfield & Tukey 1956, "Average values
of mean squares in factorials"; Owen 2007, "The pigeonhole bootstrap", arXiv 0712.1111, for why neither of the first two
alone will do), mean squares estimate

    V_units   G / (G - 1) sum_u (mean_c phi_cu)^2                          other units, these models
    V_models  sum_c (theta_c - theta)^2 / (C (C - 1))                      other models, these units
    V_left    G / (G - 1) sum_cu (phi_cu - mean_c phi_cu)^2 / (C (C - 1))  in each of the two, and counted once for both

and the intervals are `theta +- h`, with the quantiles `q_C`, `q_G` of Student's t with `C - 1` and `G - 1` degrees of
freedom (for a sum of variances as in Graybill & Wang 1980, never narrower than for models or units alone):

    h_units = q_G sqrt(V_units)     h_models = q_C sqrt(V_models)
    h_both  = max(h_models, sqrt(q_G^2 V_units + q_C^2 max(V_models - V_left, 0)))

They cover: `tests/study/test_statistics.py` draws models and samples anew, some hundred times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
_LEAST, _MOST = 1e-12, 1 - 1e-9  # of p-values that are told from 0 and from 1


class Effect(NamedTuple):
    """A mean difference, in shares of right answers from -1 to 1, with 95 % intervals; NaN where there can be none."""

    mean: float
    over_samples: Interval  # for other samples, of these models
    over_models: Interval  # for other models, on these samples
    over_both: Interval
    p: float  # two-sided, of no difference, over both
    by_model: Floats  # (C,)

    @property
    def wins(self) -> int:
        """In how many models the difference is above 0."""
        return int((self.by_model > 0).sum())

    @property
    def ties(self) -> int:
        """In how many models it is 0."""
        return int((self.by_model == 0).sum())


def paired_effect(
    differences: Sequence[ArrayLike], units: Sequence[ArrayLike] | None = None, *, level: float = 0.95
) -> Effect:
    """Returns the mean over models of the mean over test sets of paired differences.

    Args:
        differences: of each test set, after minus before, (C, n_t), such as -1, 0 and 1.
        units: of each test set, which unit each sample belongs to, whole numbers (n_t,), the same in all test sets;
            None where each sample is one by itself.
        level: the intervals' confidence, in (0, 1).

    Raises:
        ValueError: if there is no test set, no sample or no model, or the shapes don't fit.

    Example:
        >>> effect = paired_effect([[[1, 0, 1, 0], [1, 0, 0, 0]]])
        >>> round(effect.mean, 3), effect.wins
        (0.375, 2)
    """
    given = [np.asarray(each) for each in differences]  # of bytes, perhaps: converted one by one
    if not given or any(each.ndim != 2 or 0 in each.shape or len(each) != len(given[0]) for each in given):
        raise ValueError(
            "Expected `differences` (models, samples) of one test set or more, with the same models in each, but got "
            f"shapes {[each.shape for each in given]}."
        )
    by_model = np.mean([each.mean(axis=1, dtype=np.float64) for each in given], axis=0)
    phi = _influences(given, _numbered(given, units))
    C, G = phi.shape
    theta = float(by_model.mean())
    of_units = phi.mean(axis=0)
    V_units = G / (G - 1) * float(of_units @ of_units) if G > 1 else math.nan
    V_models = float(((by_model - theta) ** 2).sum()) / (C * (C - 1)) if C > 1 else math.nan
    left = phi - of_units
    V_left = G / (G - 1) * float((left * left).sum()) / (C * (C - 1)) if C > 1 and G > 1 else math.nan
    widths = _Widths(V_units, V_models, V_left, G - 1, C - 1)
    over_samples, over_models, over_both = ((theta - h, theta + h) for h in widths.at(1 - level))
    return Effect(theta, over_samples, over_models, over_both, widths.p(theta), by_model)


class _Widths(NamedTuple):
    """The variances, and the degrees of freedom of units and of models."""

    V_units: float
    V_models: float
    V_left: float
    df_units: int
    df_models: int

    def at(self, alpha: float) -> tuple[float, float, float]:
        """Returns half widths of intervals with confidence `1 - alpha`: over units, over models, over both."""
        from scipy.stats import t

        q_G, q_C = (float(t.isf(alpha / 2, df)) if df > 0 else math.nan for df in (self.df_units, self.df_models))
        h_units, h_models = q_G * math.sqrt(self.V_units), q_C * math.sqrt(self.V_models)
        more = q_C * math.sqrt(max(self.V_models - self.V_left, 0.0)) if self.df_models > 0 else math.nan
        h_both = math.hypot(h_units, more)
        return h_units, h_models, max(h_models, h_both) if h_both == h_both else math.nan

    def p(self, theta: float) -> float:
        """Returns the largest `alpha` at which the interval over both does not reach from `theta` to 0."""
        from scipy.optimize import brentq

        if not self.df_units > 0 or not self.df_models > 0:
            return math.nan
        size = abs(theta)
        if self.at(_LEAST)[2] < size:
            return _LEAST
        if theta == 0 or self.at(_MOST)[2] >= size:
            return 1.0
        root = brentq(lambda log: self.at(math.exp(log))[2] - size, math.log(_LEAST), math.log(_MOST))
        return math.exp(root)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted so that the chance of any false call among them is what each is compared with.

    The i-th smallest of m is multiplied by `m - i + 1`, and none is below a smaller one (Holm 1979, "A simple
    sequentially rejective multiple test procedure"). NaN stays, and does not count.

    Example:
        >>> holm([0.04, 0.01])
        [0.04, 0.02]
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((index for index, p in enumerate(p_values) if p == p), key=lambda index: p_values[index])
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Returns for each point whether none is better in one of two numbers and as good in the other; larger is better.

    Example:
        >>> pareto_front([(1, 0), (0, 1), (0, 0.5)])
        [True, True, False]
    """
    return [not any(x >= a and y >= b and (x > a or y > b) for x, y in points) and a == a and b == b for a, b in points]


def _numbered(given: Sequence[NDArray[np.generic]], units: Sequence[ArrayLike] | None) -> list[NDArray[np.int64]]:
    """Returns the units of each test set by numbers from 0, without gaps."""
    if units is None:
        ends = np.cumsum([each.shape[1] for each in given])
        return np.split(np.arange(ends[-1]), ends[:-1])
    named = [np.asarray(each) for each in units]
    if [each.shape for each in named] != [each.shape[1:] for each in given]:
        raise ValueError(
            f"Expected `units` of each sample, {[each.shape[1:] for each in given]}, but got shapes "
            f"{[each.shape for each in named]}."
        )
    _, numbers = np.unique(np.concatenate(named), return_inverse=True)
    return np.split(numbers, np.cumsum([len(each) for each in named])[:-1])


def _influences(given: Sequence[NDArray[np.generic]], units: Sequence[NDArray[np.int64]]) -> Floats:
    """Returns phi (C, G)."""
    G = 1 + max(int(each.max()) for each in units)
    phi = np.zeros((len(given[0]), G))
    for each, unit in zip(given, units, strict=True):
        for row, d in zip(phi, each, strict=True):
            centred = d.astype(np.float64)
            centred -= centred.mean()
            row += np.bincount(unit, weights=centred, minlength=G) / (len(given) * len(d))
    return phi
