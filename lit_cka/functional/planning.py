"""How many samples a CKA takes, from a pilot of features: `plan_samples`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.cka import hsic
from lit_cka.functional.intervals import cka_interval
from lit_cka.functional.jackknife import MIN_SAMPLES, Jackknife, jackknife_cka, unit_gram
from lit_cka.functional.moments import check_features

MOST_PILOT = 2048  # samples of a pilot that are used, since Gram matrices grow with their square
MOST_SAMPLES = 10**9
_FEWEST = 20  # below, intervals are not known to cover


class SamplePlan(NamedTuple):
    """What a pilot says of the samples that are needed.

    Example:
        >>> plan = SamplePlan(n=400, cka=0.9, low=0.8, high=0.95, plain=0.93)
        >>> round(plan.plain - plan.cka, 2)  # the bias of the plain estimator
        0.03
    """

    # So many, at least 20, give an interval as narrow as asked; None where CKA is undefined, or a billion do not.
    n: int | None
    cka: float  # debiased, of the pilot
    low: float  # the interval that the pilot gives by itself
    high: float
    plain: float  # what the plain estimator is to be expected to give with n samples: its bias is `plain - cka`


@takes_arrays
def plan_samples(X: Tensor, Y: Tensor, *, width: float = 0.05, level: float = 0.95) -> SamplePlan:
    """Returns how many samples give an interval of `cka_interval` of at most this width, high - low.

    Both parts of the variance are those of the pilot, as a part of the n samples, and how they fall with n is known
    (`cka_interval`). So is what
    the plain estimator gives of n samples, from HSIC's expectation (Song et al. 2012, eq. 5, solved for the trace):

        E tr(Kc Lc) = n (n-3) HSIC + n (n/(n-2)) E k_i l_i - (n-1)/(n-2) E k_i E l_i        k_i, l_i the squared norms

    Args:
        X: features of a pilot (m, d_x), some hundred samples, any floating dtype.
        Y: the other features (m, d_y) of the same samples: of the model before and after, say.
        width: of the interval, in (0, 2).
        level: its confidence, in (0, 1).

    Raises:
        ValueError: on wrong shapes, fewer than 8 samples, or a width or level out of range.

    Example:
        >>> X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> Y = X + torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> plan_samples(X, Y, width=0.05).n
        1317
    """
    check_features(X, Y)
    if not 0 < width < 2:
        raise ValueError(f"Expected `width` to be between 0 and 2, but got {width}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be between 0 and 1, but got {level}.")
    if len(X) < MIN_SAMPLES:
        raise ValueError(f"Expected a pilot of at least {MIN_SAMPLES} samples, but got {len(X)}.")
    K, L = unit_gram(X[:MOST_PILOT]), unit_gram(Y[:MOST_PILOT])
    samples = jackknife_cka(K, L)
    low, high = cka_interval(samples.value, len(K), samples, level)
    n = _smallest(samples, width, level)
    plain = torch.nan if n is None else expected_plain_cka(K, L, n).item()
    return SamplePlan(n, samples.value.item(), low.item(), high.item(), plain)


def expected_plain_cka(K: Tensor, L: Tensor, n: int) -> Tensor:
    """Returns the plain CKA that n samples may be expected to have, from centred Gram matrices (m, m) of a pilot."""
    m = len(K)
    k, l_ = K.diagonal(), L.diagonal()

    def trace(K: Tensor, L: Tensor, k: Tensor, l_: Tensor) -> Tensor:
        mean_k, mean_l = k.sum() / (m - 1), l_.sum() / (m - 1)
        both = (k * l_).mean() * n * n / (n - 2)
        return n * (n - 3) * hsic(K, L, unbiased=True) + both - (n - 1) / (n - 2) * mean_k * mean_l

    return trace(K, L, k, l_) / (trace(K, K, k, k) * trace(L, L, l_, l_)).sqrt()


def _smallest(samples: Jackknife, width: float, level: float) -> int | None:
    def is_enough(n: int) -> bool:
        low, high = cka_interval(samples.value, n, samples, level)
        return bool(high - low <= width)

    if not is_enough(MOST_SAMPLES):
        return None
    few, enough = _FEWEST - 1, MOST_SAMPLES
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if is_enough(middle) else (middle, enough)
    return enough
