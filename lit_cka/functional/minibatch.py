"""Sums over batches of the unbiased HSIC of every layer with every other: the minibatch estimator of CKA.

Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?" (arXiv 2010.15327), eq. 2. Shapes: `k` and `l`
layers, `n` samples in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.cka import min_num_samples, pairwise_hsic, self_hsic
from lit_cka.functional.kernels import linear_gram, rbf_gram
from lit_cka.functional.moments import check_features
from lit_cka.functional.units import common_exponent, exponents_of, in_unit

Kernel = Literal["linear", "rbf"]


class HSICSums(NamedTuple):
    """Sums over batches, of features in the unit that the exponents say (see `lit_cka.functional.units`)."""

    xy: Tensor  # (k, l)
    xx: Tensor  # (k,)
    yy: Tensor  # (l,)
    n: Tensor  # () samples
    exponents_x: Tensor  # (k,)
    exponents_y: Tensor  # (l,)


def empty_hsic_sums(k: int, l: int, device: torch.device | str | None = None) -> HSICSums:  # noqa: E741
    """Returns the sums over no batch."""
    return HSICSums(*(torch.zeros(s, dtype=torch.float64, device=device) for s in ((k, l), k, l, (), k, l)))


def add_batch(
    sums: HSICSums, X: Sequence[Tensor], Y: Sequence[Tensor], kernel: Kernel = "linear", bandwidth: float = 1.0
) -> HSICSums:
    """Returns the sums with one batch more.

    Args:
        sums: so far.
        X: the features (n, d_i) of `k` layers, any floating dtype and widths.
        Y: those of `l` layers, of the same samples in the same order.
        kernel: "linear" or "rbf".
        bandwidth: as for `rbf_gram`.

    Raises:
        ValueError: on integer features, fewer than 4 samples, or unequal `n`.
    """
    for layers in (X, Y):
        for layer in layers:
            check_features(layers[0], layer)
    if len(X[0]) != len(Y[0]):
        raise ValueError(
            "Expected `X` and `Y` to hold the same samples in the same order, "
            f"but got {len(X[0])} and {len(Y[0])} samples."
        )
    if len(X[0]) < (needed := min_num_samples(debiased=True)):
        raise ValueError(
            f"Expected at least {needed} samples in a batch for the unbiased HSIC, but got {len(X[0])}. "
            "Use a larger batch size, and drop_last=True if only the last batch is that small."
        )
    device = sums.n.device
    X, Y = ([layer.detach().to(device).to(torch.float64) for layer in layers] for layers in (X, Y))
    # Of a layer that has not varied yet, the unit is not settled.
    exponents_x, exponents_y = (
        torch.where(so_far == 0, torch.stack([exponents_of(layer) for layer in layers]), exponents)
        for layers, so_far, exponents in ((X, sums.xx, sums.exponents_x), (Y, sums.yy, sums.exponents_y))
    )
    Ks, Ls = (
        torch.stack([_gram(in_unit(layer, unit), kernel, bandwidth) for layer, unit in zip(layers, units, strict=True)])
        for layers, units in ((X, exponents_x), (Y, exponents_y))
    )
    return HSICSums(
        sums.xy + pairwise_hsic(Ks, Ls, unbiased=True),
        sums.xx + self_hsic(Ks, unbiased=True),
        sums.yy + self_hsic(Ls, unbiased=True),
        sums.n + len(X[0]),
        exponents_x,
        exponents_y,
    )


def _gram(X: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    return rbf_gram(X, bandwidth=bandwidth) if kernel == "rbf" else linear_gram(X)


def in_units_of(sums: HSICSums, exponents_x: Tensor, exponents_y: Tensor, kernel: Kernel = "linear") -> HSICSums:
    """Returns the same sums in units with these exponents. An RBF kernel is the same in any."""
    if kernel == "rbf":
        return sums._replace(exponents_x=exponents_x, exponents_y=exponents_y)
    # Of layers that have not varied, sums are 0, which no power of s may turn into 0 times infinity.
    s = torch.exp2(sums.exponents_x - exponents_x).where(sums.xx != 0, 1.0)
    t = torch.exp2(sums.exponents_y - exponents_y).where(sums.yy != 0, 1.0)
    return HSICSums(
        sums.xy * s.square()[:, None] * t.square(),
        sums.xx * s.square().square(),
        sums.yy * t.square().square(),
        sums.n,
        exponents_x,
        exponents_y,
    )


def merge_hsic_sums(first: HSICSums, second: HSICSums, kernel: Kernel = "linear") -> HSICSums:
    """Returns the sums over the batches of both."""
    units = (
        common_exponent(torch.stack([first.exponents_x, second.exponents_x]), torch.stack([first.xx, second.xx])),
        common_exponent(torch.stack([first.exponents_y, second.exponents_y]), torch.stack([first.yy, second.yy])),
    )
    (xy, xx, yy, n, *_), others = in_units_of(first, *units, kernel), in_units_of(second, *units, kernel)
    return HSICSums(xy + others.xy, xx + others.xx, yy + others.yy, n + others.n, *units)


def cka_from_hsic_sums(sums: HSICSums) -> Tensor:
    """Returns CKA (k, l), in about [-1, 1]; NaN where a layer's mean self-HSIC is not positive."""
    scale = torch.outer(sums.xx.clamp(min=0).sqrt(), sums.yy.clamp(min=0).sqrt())
    return (sums.xy / scale).masked_fill(scale == 0, torch.nan)
