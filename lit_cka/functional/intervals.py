"""Confidence intervals of debiased CKA, from a `Jackknife` of the samples or of a part of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.jackknife import Jackknife

ONE = 1 - 1e-12  # from here on, a CKA is that of features with themselves
_HALVINGS = 50  # of the range that a bound is looked for in


@takes_arrays
def cka_interval(cka: Tensor, n: int | Tensor, samples: Jackknife, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Returns the confidence interval for the population's CKA about the debiased estimate of `n` samples.

    The bounds are the `t` that the estimate would not be unusual for, each with the variance that it would have there:

        |phi(t) - phi(cka)| = q sqrt(c_0 + c_1 t)            phi(t) = -log(1 - t), near 1 the unit of even errors
        c_0   = 2 tau^2 / (n (1 - T))^2                      the part of pairs
        c_1 T = (V - 4 tau^2 / (m (1 - T))^2) s m / n        the part of single samples
        V     = (m - 1) / m  sum_i (phi(T_i) - mean)^2       Tukey 1958; it has the pairs twice (Efron & Stein 1981)
        s     = 1 + sqrt((kappa - 1) (1 / m - 1 / n))        V's relative standard error as that of all n samples

    with `T`, `T_i` and `tau^2` of the jackknife, and the kurtosis `kappa` of the phi(T_i). A part of the samples is
    likely to lack the few far ones that make up much of the variance, so that its V is taken a standard error larger;
    where all tell the error, they have what moved the estimate, and s is 1.

    The part of single samples vanishes with the CKA, and that of pairs does not (a score interval, Wilson 1927: an
    estimate that is low by chance also has too small a variance). Where T itself is not told from 0, `c_1` is led to
    the largest that normal features have, `4 / n` times the concentration. `q` is the quantile of Student's t with
    2 m / (kappa - 1) degrees of freedom (Satterthwaite 1946).

    In simulations at 95 % (features narrower and wider than the samples are many, spectra flat and steep, CKA from 0
    to 0.99) it covered the population's CKA in 92 to 98 % of trainings, for n of 50, 200 and 2,000, of which 256 told
    the error: of normal features, and of heavy-tailed ones (t with 6 degrees of freedom). That is of 400 trainings or
    more, but of 100 for features wider than 2,000 samples are many. Samples must be independent: repeated or grouped
    ones make it too narrow.

    Args:
        cka: debiased estimates (...), of all `n` samples.
        n: their number, (...) where it is not the same for all.
        samples: the jackknife of them, or of a random part.
        level: of confidence.

    Returns:
        Lower and upper bounds (...), in [-1, 1]; the CKA itself where it is 1; NaN where it or the jackknife is.

    Example:
        >>> from lit_cka.functional import linear_jackknife
        >>> X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> Y = X + torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> each = linear_jackknife(X, Y)
        >>> low, high = cka_interval(each.value, 64, each)
        >>> print(f"{low:.2f} < {each.value:.2f} < {high:.2f}")
        0.36 < 0.47 < 0.58
    """
    m, T = samples.without.shape[-1], samples.value.clamp(max=ONE)
    n = torch.as_tensor(n, dtype=torch.float64, device=T.device)
    deviations = _phi(samples.without) - _phi(samples.without).mean(-1, keepdim=True)
    squares = deviations.square().sum(-1)
    pair_error = (2 * samples.pairs).sqrt() / m
    single = ((m - 1) / m * squares - 2 * (pair_error / (1 - T)).square()).clamp(min=0)
    c0 = (pair_error / (1 - T)).square() * (m / n) ** 2
    kurtosis = _kurtosis(deviations)
    single = single * _factor_of_part(kurtosis, m, n)
    c1 = (single + pair_error * 4 / m * samples.concentration) / (T.clamp(min=0) + pair_error) * (m / n)
    q = _quantile(kurtosis, m, level)
    near, sign = cka.clamp(max=ONE), torch.tensor([-1.0, 1.0], dtype=cka.dtype, device=cka.device)
    sign = sign.reshape(2, *[1] * cka.ndim)  # of both ends at once
    start, c1 = _phi(near), c1.nan_to_num(0.0)
    near, far = near.expand(2, *cka.shape), sign.expand(2, *cka.shape)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        error = (c0 + c1 * middle.clamp(min=0)).sqrt()
        is_inside = sign * (_phi(middle) - start) < q * error
        near, far = torch.where(is_inside, middle, near), torch.where(is_inside, far, middle)
    bounds = torch.where(cka >= ONE, cka, (near + far) / 2)
    undefined = cka.isnan() | samples.pairs.isnan() | samples.without.isnan().any(-1)
    low, high = (bound.masked_fill(undefined, torch.nan) for bound in bounds)
    return low, high


@takes_arrays
def change_interval(
    now: Tensor, before: Tensor, n: int | Tensor, without: tuple[Tensor, Tensor], level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Returns the confidence interval of the difference of two CKAs of the same `n` samples, `now - before`.

    It is paired: what is peculiar to a sample is so in both, and most of it cancels. Two intervals that overlap say
    nothing of a difference. The variance of a part of the samples is taken a standard error larger, as there.

    Args:
        now: debiased estimates (...), of all `n` samples.
        before: the same of other features, or another reference.
        n: the number of samples.
        without: of both, `Jackknife.without` (..., m) of the same samples in the same order.
        level: of confidence.

    Returns:
        Lower and upper bounds (...); NaN where one of the CKAs is.

    Example:
        >>> from lit_cka.functional import linear_jackknife
        >>> X, noise = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> before, now = linear_jackknife(X, X + noise), linear_jackknife(X, X + 2 * noise)
        >>> low, high = change_interval(now.value, before.value, 100, (now.without, before.without))
        >>> bool(high < 0)  # it has fallen, by more than chance
        True
    """
    difference = without[0] - without[1]
    m, n = difference.shape[-1], torch.as_tensor(n, dtype=torch.float64, device=difference.device)
    deviations = difference - difference.mean(-1, keepdim=True)
    kurtosis = _kurtosis(deviations)
    variance = (m - 1) / n * deviations.square().sum(-1) * _factor_of_part(kurtosis, m, n)
    half = _quantile(kurtosis, m, level) * variance.sqrt()
    return now - before - half, now - before + half


def _phi(T: Tensor) -> Tensor:
    return -torch.log1p(-T.clamp(max=ONE))


def _kurtosis(deviations: Tensor) -> Tensor:
    squares = deviations.square()
    kurtosis: Tensor = squares.square().mean(-1) / squares.mean(-1).square()
    return kurtosis


def _factor_of_part(kurtosis: Tensor, m: int, n: Tensor) -> Tensor:
    """Returns what the variance of m samples is to be multiplied with to stand for that of n: `s` of `cka_interval`."""
    return 1 + ((kurtosis - 1) * (1 / m - 1 / n).clamp(min=0)).sqrt().nan_to_num(0.0)


def _quantile(kurtosis: Tensor, m: int, level: float) -> Tensor:
    """Returns the two-sided quantile (...) of Student's t for a variance estimated from m deviations."""
    from scipy.special import stdtrit

    freedom = (2 * m / (kurtosis - 1)).clamp(2.5, m - 1).nan_to_num(m - 1)
    quantiles = stdtrit(freedom.cpu().numpy(), (1 + level) / 2)
    return torch.as_tensor(quantiles, dtype=kurtosis.dtype, device=kurtosis.device)
