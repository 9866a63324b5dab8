"""How far scores are from chance: p-values, the excess over the null, and the best of all pairs, by permuting samples.

Groger, Wen & Brbic 2026, "Revisiting the Platonic Representation Hypothesis: An Aristotelian View" (arXiv 2602.14486):
calibrated scores, section 5. Westfall & Young 1993, "Resampling-based multiple testing": the maximum over all pairs.
Phipson & Smyth 2010, "Permutation p-values should never be zero": why the observed order counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_cka.analysis.measures import centred_grams, sampling_factors
from lit_cka.analysis.permuted import permuted_similarity
from lit_cka.analysis.settings import WITH_MOMENTS, Settings
from lit_cka.functional.permutation_moments import permutation_moments
from lit_cka.functional.permutations import draw_orders

_TIE = 1e-10  # scores that are closer are equal
_FLOAT32_TIE = 1e-6  # where products of permuted matrices are in float32
_IN_FLOAT32 = (*WITH_MOMENTS, "rsa")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BestPair:
    """The pair of layers with the best score, and what is left of it when the search is accounted for.

    Attributes:
        row: its layer of the first model.
        column: its layer of the second.
        p_value: how often the best of all pairs would be as good by chance.
        excess: the score's excess over the null of the best of all pairs.

    Example:
        >>> BestPair(row=3, column=4, p_value=0.005, excess=0.8).excess
        0.8
    """

    row: int
    column: int
    p_value: float
    excess: float


@dataclass(frozen=True)
class Calibration:
    """Scores against their null distributions, each (k, l); NaN where the score is.

    Attributes:
        p_values: how often unrelated samples would look as similar, of this pair alone.
        adjusted_p_values: how often the best of all pairs would look as similar as this one.
        thresholds: the null's quantile, below which scores are chance.
        excess: `(score - threshold) / (equal - threshold)`: 0 up to the threshold, 1 for equal features.
        best: the best pair; None where no score is defined.

    Example:
        >>> from lit_cka.analysis import Features, Settings, compare_features
        >>> X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        >>> ids = [str(number) for number in range(40)]
        >>> before, after = (Features({"layer": X * scale}, ids) for scale in (1, 2))
        >>> compare_features(before, after, Settings(num_permutations=19)).calibration.p_values
        array([[0.05]])
    """

    p_values: Array
    adjusted_p_values: Array
    thresholds: Array
    excess: Array
    best: BestPair | None


def calibrate(Xs: Sequence[Tensor], Ys: Sequence[Tensor], values: Tensor, settings: Settings) -> Calibration:
    """Returns how far the scores of layers with layers are from chance.

    The samples of `Ys` are permuted, which leaves each side as it is and takes away what they have in common:

        p        = (1 + #{permutations: s* >= s}) / (1 + num_permutations)
        adjusted = (1 + #{permutations: max over all pairs of s* >= s}) / (1 + num_permutations)
        excess   = max(0, (s - t) / (s_max - t)),  t the null's quantile at `level`, observed order included

    One permutation serves all pairs, so that the maximum has the dependence between layers in it. All of it is exact
    for independent samples: under the null p-values are uniform but for ties, the smallest adjusted one too. Of a
    model with itself, layers with themselves are left out of the maximum. Of a distance the smallest is the best.

    With `null="moments"` the null of a pair is a Pearson type III distribution with the mean, variance and skewness
    of all permutations, in closed form (`permutation_moments`). Nothing is drawn, and the p-values have no least one;
    in exchange they are approximate, for the adjusted ones m pairs take m times the p-value (Bonferroni), which is
    larger where layers depend on each other, and the quantile of the best pair's null is at `1 - (1 - level) / m`. From
    10 samples on, 4.6 to 5.2 % of permutations were above its 5 % quantile and 0.84 to 1.1 % above that of 1 %, but
    where one sample is far from all others (benchmarks/permutations.py), where `compare` permutes instead.

    Args:
        Xs: features (n, d) of each layer of the first model.
        Ys: of the second; the same object to compare a model with itself.
        values: their scores (k, l), by `similarity`.
        settings: measure, permutations, level, seed.

    Raises:
        ValueError: on fewer than 6 samples with `null="moments"`.
    """
    considered = torch.ones_like(values, dtype=torch.bool)
    if Xs is Ys and len(Xs) > 1:
        considered.fill_diagonal_(False)
    considered &= values.isfinite()
    if settings.null == "moments":
        return _by_moments(Xs, Ys, values, settings, considered)
    orders = draw_orders(len(Xs[0]), settings.num_permutations, settings.seed)
    orders = torch.cat([torch.arange(len(Xs[0]))[None], orders])
    sign = -1.0 if settings.equal == 0 else 1.0
    null = sign * permuted_similarity(Xs, Ys, settings, orders).cpu()  # the first is the observed order
    scores, equal = sign * values.cpu(), sign * settings.equal
    undefined = ~values.isfinite().cpu()
    reached = null[0] - (_FLOAT32_TIE if settings.measure in _IN_FLOAT32 else _TIE)
    p_values = (null >= reached).double().mean(dim=0).masked_fill(undefined, torch.nan)
    maxima = null.masked_fill(~considered.cpu(), -torch.inf).flatten(1).amax(dim=1)
    adjusted = (maxima[:, None, None] >= reached).double().mean(dim=0).masked_fill(undefined, torch.nan)
    rank = math.ceil(settings.level * len(orders) - 1e-9) - 1
    thresholds = null.sort(dim=0).values[rank].masked_fill(undefined, torch.nan)
    best = _best(scores, considered.cpu(), adjusted, maxima.sort().values[rank].expand_as(scores), equal)
    excess = _excess(scores, thresholds, equal)
    return Calibration(p_values.numpy(), adjusted.numpy(), (sign * thresholds).numpy(), excess.numpy(), best)


def _by_moments(
    Xs: Sequence[Tensor], Ys: Sequence[Tensor], values: Tensor, settings: Settings, considered: Tensor
) -> Calibration:
    from scipy.stats import pearson3

    Ks = centred_grams(Xs, settings)
    Ls = Ks if Xs is Ys else centred_grams(Ys, settings)
    moments = permutation_moments(Ks, Ls)
    sizes = torch.outer(*(matrices.flatten(1).norm(dim=1) for matrices in (Ks, Ls)))
    if settings.measure == "sampled_features_cka":
        sizes = sizes / sampling_factors(Xs, Ys)
    mean, deviation = moments.mean / sizes, moments.variance.sqrt() / sizes
    # Where all orders are alike, all are as good as the observed one.
    fixed = deviation <= _FLOAT32_TIE
    skewness, spread = moments.skewness.masked_fill(fixed, 0.0), deviation.masked_fill(fixed, 1.0)
    null = pearson3(skewness.numpy(), mean.numpy(), spread.numpy())
    p_values = torch.from_numpy(np.asarray(null.sf(values.numpy()))).masked_fill(fixed, 1.0)
    thresholds = torch.from_numpy(np.asarray(null.ppf(settings.level))).where(~fixed, values)
    num_pairs = max(int(considered.sum()), 1)
    of_best = torch.from_numpy(np.asarray(null.ppf(1 - (1 - settings.level) / num_pairs))).where(~fixed, values)
    undefined = ~values.isfinite()
    p_values, thresholds = (each.masked_fill(undefined, torch.nan) for each in (p_values, thresholds))
    adjusted = (p_values * num_pairs).clamp(max=1)
    best = _best(values, considered, adjusted, of_best, 1.0)
    excess = _excess(values, thresholds, 1.0)
    return Calibration(p_values.numpy(), adjusted.numpy(), thresholds.numpy(), excess.numpy(), best)


def _best(scores: Tensor, considered: Tensor, adjusted: Tensor, thresholds: Tensor, equal: float) -> BestPair | None:
    """Returns the pair with the largest score of those considered."""
    if not considered.any():
        return None
    place = int(scores.masked_fill(~considered, -torch.inf).argmax())
    excess = _excess(scores, thresholds, equal).flatten()[place]
    return BestPair(*divmod(place, scores.shape[1]), float(adjusted.flatten()[place]), float(excess))


def _excess(scores: Tensor, thresholds: Tensor, equal: float) -> Tensor:
    """Returns the excess over the thresholds, in [0, 1] but for scores above those of equal features."""
    room = equal - thresholds
    excess = ((scores - thresholds) / room).clamp(min=0)
    # No room: chance reaches as far as equal features do.
    return excess.masked_fill(room <= _FLOAT32_TIE, 0.0).masked_fill(scores.isnan() | thresholds.isnan(), torch.nan)
