"""Error bars of CKA over the samples, for every pair of layers at once: bootstrap intervals.

They work on the centred Gram matrices whose cosine CKA is: `Kc = H K H` for the plain estimator, and for the
debiased one the U-centred matrix of Szekely & Rizzo 2014 (arXiv 1310.2926), a diagonal of 0 and rows that sum to 0:

    A_ij = Kc_ij + (Kc_ii + Kc_jj) / (n - 2) - tr(Kc) / ((n - 1) (n - 2))            i != j

whose inner products are n (n - 3) times the unbiased HSIC. Shapes: `Ks` (a, n, n), `Ls` (b, n, n), of any kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.analysis.resampling import ResampledGram, Resamples, draw_counts, u_centred
from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.cka import hsic, min_num_samples

_CHUNK = 256  # resamples whose sums over the samples are held at once
_LARGEST = 1 - 1e-15  # that Fisher's transformation can take
_NO_ERROR = 1e-12  # a standard error below this is rounding


@takes_arrays
def bootstrap_cka(
    Ks: Tensor,
    Ls: Tensor,
    *,
    debiased: bool = True,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns bootstrap confidence intervals, over the samples, of the CKA of every `Ks` with every `Ls`.

    The studentised bootstrap on Fisher's scale (DiCiccio & Efron 1996, "Bootstrap Confidence Intervals", section 4;
    Tibshirani 1988 for the transformation). Samples are drawn with replacement, the same ones for all pairs, and

        t* = (atanh T* - atanh T) / s*          interval = tanh(atanh T - s q), q the quantiles of t*

    with `T` the CKA, `T*` that of a resample, `s`, `s*` their standard errors from the samples' influence on them.

    Two things are not as in the textbook, since CKA is a ratio of U-statistics, sums over pairs of samples:

    - A sample drawn twice is not a pair: its kernel value would be from the diagonal, which the debiased estimator
      leaves out. Such pairs are dropped, so `T*` is as unbiased as `T`.
    - Resampling exaggerates how much the samples' influences differ, since these are averages over n noisy pairs; for
      unrelated features, where nothing else is left (a degenerate U-statistic, Arcones & Giné 1992), the variance
      would come out three times too large. The influences are shrunk to the variance that is left without that
      noise, `tau^2 / n`, with `tau^2` from an unbiased estimate: the HSIC of the pairs' contributions with themselves.

    The debiased interval is one for the population's CKA. It covered it in 93 to 98 % of 400 draws at 95 %: with 10 to
    300 samples, a CKA from 0 to 0.999, features narrower and wider than the samples are many, normal ones and ones with
    tails as heavy as t with 4 degrees of freedom. Where it misses, the CKA is mostly higher than the interval. With 10
    samples it is next to all of [0, 1]. Samples must be independent: repeated or grouped ones make it too narrow.

    The plain interval is one for the mean of the plain estimator at this `n`, not for the population's CKA: no interval
    about an estimator that is biased upward says how far it is off.

    Args:
        Ks: Gram matrices (a, n, n), any kernel and floating dtype; they need not be centred.
        Ls: Gram matrices (b, n, n) of the same samples in the same order.
        debiased: the estimator, as in `cka_from_gram`.
        num_resamples: at least 1; 1,000 leave about half a percent of Monte Carlo noise in the coverage.
        level: the intervals' confidence, in (0, 1).
        seed: the same seed gives the same intervals.

    Returns:
        low, high: float64 (a, b) in [-1, 1]. NaN where the CKA is; the CKA itself where no resample can change it, as
        for a matrix with itself.

    Raises:
        ValueError: on wrong shapes, integer matrices, fewer than 4 samples, or options out of range.
    """
    _check(Ks, Ls, num_resamples=num_resamples)
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be between 0 and 1, but got {level}.")
    A, B = ([u_centred(gram, debiased) for gram in grams] for grams in (Ks, Ls))
    counts = draw_counts(Ks.shape[-1], num_resamples, seed).to(A[0].A)
    once = Resamples(torch.ones_like(counts[:, :1]))
    whole = [ResampledGram(L, once) for L in B]
    estimates = [[_estimate(K, L) for L in whole] for K in (ResampledGram(K, once) for K in A)]
    t = counts.new_empty(len(A), len(B), num_resamples)
    for start in range(0, num_resamples, _CHUNK):
        part = slice(start, start + _CHUNK)
        resamples = Resamples(counts[:, part])
        drawn = [ResampledGram(L, resamples) for L in B]
        for i, K in enumerate(ResampledGram(K, resamples) for K in A):
            for j, L in enumerate(drawn):
                # Half the work for a model with itself.
                mirrored = Ls is Ks and j < i
                t[i, j, part] = t[j, i, part] if mirrored else _studentised(K, L, estimates[i][j])
    centre = torch.stack([torch.stack([estimate.value for estimate in row]) for row in estimates])
    error = torch.stack([torch.stack([estimate.error for estimate in row]) for row in estimates])
    tails = t.new_tensor([(1 + level) / 2, (1 - level) / 2])
    upper, lower = torch.stack([row.nanquantile(tails, dim=-1) for row in t], dim=1)
    scale = error / (1 - centre.square())
    fixed = error <= _NO_ERROR
    low, high = (torch.tanh(centre.atanh() - scale * q).where(~fixed, centre) for q in (upper, lower))
    return low, high


class _Estimate(NamedTuple):
    """The CKA of two Gram matrices with every sample once."""

    value: Tensor  # ()      T
    error: Tensor  # ()      s
    excess: Tensor  # (n, 1) what the estimated influence of each sample owes to noise


def _cka_and_influence(K: ResampledGram, L: ResampledGram) -> tuple[Tensor, Tensor]:
    """Returns T (c,) and the samples' first-order influence on it (n, c)."""
    cross, part = K.inner(L)
    n, size = len(part), K.square.sqrt() * L.square.sqrt()
    value = cross / size
    return value, part * (2 * n / size) - (K.share + L.share) * (n * value)


def _estimate(K: ResampledGram, L: ResampledGram) -> _Estimate:
    value, influence = _cka_and_influence(K, L)
    influence = influence - influence.mean()
    n, A, B = len(influence), K.gram.A, L.gram.A
    variance = influence.square().mean() / n
    # The pairs' contributions to T, and the part of them that is neither of one sample nor of the other.
    self_terms = A.square() / K.square + B.square() / L.square
    Q = n * (n - 3) * (A * B / (K.square * L.square).sqrt() - value / 2 * self_terms)
    tau2 = hsic(Q, Q, unbiased=True)
    left = (1 - 4 * tau2 / (n * n * variance)).clamp(min=0).sqrt()
    return _Estimate(value[0].clamp(-_LARGEST, _LARGEST), variance.sqrt(), (1 - left) * influence)


def _studentised(K: ResampledGram, L: ResampledGram, estimate: _Estimate) -> Tensor:
    """Returns t* (c,) of the resamples, on Fisher's scale; NaN where T* is not inside (-1, 1)."""
    value, influence = _cka_and_influence(K, L)
    W, n = K.resamples.W, len(influence)
    influence -= estimate.excess
    drawn = W * influence
    variance = (drawn * influence).sum(0) / n - (drawn.sum(0) / n).square()
    error = (variance.clamp(min=0) / n).sqrt().clamp(min=1e-6 * estimate.error)
    excess = (estimate.excess.T @ W)[0] / n / (1 - estimate.value.square())
    t: Tensor = (value.atanh() - estimate.value.atanh() - excess) * (1 - value.square()) / error
    return t.masked_fill(value.abs() >= 1, torch.nan)


def _check(Ks: Tensor, Ls: Tensor, **counts: int) -> None:
    if Ks.ndim != 3 or Ls.ndim != 3 or not Ks.shape[1] == Ks.shape[2] == Ls.shape[1] == Ls.shape[2]:
        raise ValueError(
            "Expected `Ks` and `Ls` to be stacks of square matrices of the same size (layers, samples, samples), "
            f"but got {tuple(Ks.shape)} and {tuple(Ls.shape)}."
        )
    if not (Ks.is_floating_point() and Ls.is_floating_point()):
        raise ValueError(f"Expected `Ks` and `Ls` to be floating point, but got {Ks.dtype} and {Ls.dtype}.")
    needed = min_num_samples(debiased=True)
    if Ks.shape[-1] < needed:
        raise ValueError(f"Expected at least {needed} samples, but got {Ks.shape[-1]}.")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {count}.")
