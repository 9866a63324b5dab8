"""Features about their mean, and features that are constant but for rounding: what every measure here starts from.

A measure of features that are the same for all samples is 0 / 0, and what rounding leaves of the two zeros must not
become a value. Features `x_i` with the mean `m` over `n` samples therefore count as constant if each of them, `j`, has

    sum_i (x_ij - m_j)^2  <=  (16 eps)^2  n max(m_j^2, M^2)          eps = 2^-52, the resolution of float64

that is, if it is spread over no more than 16 units in the last place of its mean, or of what is usual in the layer, the
median `M` of all `|m_j|`: a feature near 0 that was computed from others has their rounding, while a single feature of
1e15 says nothing of the others' digits. One number that is computed in different orders, or in different batches,
differs from itself by a few such units; and of a spread of 16 of them no more than 4 bits would be known, so that
nothing is lost that could be told from rounding. The same 16 units are the tolerance wherever else in this package
numbers cancel: `is_rounding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 16 * torch.finfo(torch.float64).eps


def is_rounding(rest: Tensor, size: Tensor) -> Tensor:
    """Returns whether what is left (`rest`) where numbers of a `size` cancelled is no more than their rounding."""
    return rest <= ROUNDING * size


def is_constant(squares: Tensor, n: Tensor | int, mean: Tensor) -> Tensor:
    """Returns whether features are constant but for rounding, a boolean (...); see the module's equation.

    Args:
        squares: the sums over the samples of each feature's squared distance from its mean, (..., d).
        n: the number of samples.
        mean: of the features, (..., d).
    """
    if not mean.shape[-1]:
        return torch.ones(mean.shape[:-1], dtype=torch.bool, device=mean.device)
    size = mean.abs()
    size = torch.maximum(size, size.median(dim=-1, keepdim=True).values)
    return (squares <= n * (ROUNDING * size).square()).all(dim=-1)


def mean_over_samples(X: Tensor) -> Tensor:
    """Returns the mean (d,) of the features `X` (n, d). It is measured from the first sample, since constant features
    then centre to exact zeros.
    """
    return X[0] + (X - X[0]).mean(dim=0)


def about_mean(X: Tensor) -> Tensor:
    """Returns the features `X` (..., n, d) measured from their mean over the samples, in float64.

    They are measured from the first sample first, so that the mean of what is left is as exact as the spread, not as
    the values.
    """
    X = X.detach().to(torch.float64)
    X = X - X[..., :1, :]
    return X.sub_(X.mean(dim=-2, keepdim=True))


def centred(X: Tensor) -> Tensor:
    """Returns the features `X` (n, d) measured from their mean, in float64; all zeros where they are constant."""
    Xc = about_mean(X)
    mean = X[0].detach().to(torch.float64) - Xc[0]
    return Xc.masked_fill(is_constant(Xc.square().sum(dim=0), len(X), mean), 0.0)


def without_rounding(X: Tensor) -> Tensor:
    """Returns the centred features `X` (n, d), in float64, zeros where one is spread over no more than rounding.

    A feature that is dead but for rounding, with a standard deviation of 1e-33 beside others of 1, must not be scaled
    up to theirs. Beside its own mean and what is usual of the means, what is usual of the deviations is its measure.
    """
    Xc = about_mean(X)
    mean = (X[0].detach().to(torch.float64) - Xc[0]).abs()
    deviation = Xc.square().mean(dim=0).sqrt()
    if not deviation.numel():
        return Xc
    usual = torch.maximum(mean.median(), deviation.median())
    return Xc.masked_fill(is_rounding(deviation, torch.maximum(mean, usual)), 0.0)


def standardized(X: Tensor) -> Tensor:
    """Returns the features `X` (n, d) with mean 0 and unit variance, in float64; zeros where `without_rounding` has."""
    Xc = without_rounding(X)
    deviation = Xc.square().mean(dim=0).sqrt()
    return Xc / torch.where(deviation == 0, 1.0, deviation)


def double_centred(K: Tensor) -> Tensor:
    """Returns `H K H` of Gram matrices `K` (..., n, n), with `H = I - 11'/n`, in float64; all zeros where it is
    rounding, as for a matrix whose entries are all the same.
    """
    K = K.detach().to(torch.float64)
    size = K.abs().amax(dim=(-2, -1), keepdim=True)
    K = K - K[..., :1, :1]  # so that a constant matrix centres to exact zeros
    K = K - K.mean(dim=-2, keepdim=True) - K.mean(dim=-1, keepdim=True) + K.mean(dim=(-2, -1), keepdim=True)
    return K.masked_fill(is_rounding(K.abs().amax(dim=(-2, -1), keepdim=True), size), 0.0)
