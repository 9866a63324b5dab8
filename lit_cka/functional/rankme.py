"""RankMe: how many directions a set of features uses.

Garrido, Balestriero, Najman & LeCun 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised
representations by their rank" (arXiv 2210.02885), eq. 1; the effective rank of Roy & Vetterli 2007 of the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.centring import centred
from lit_cka.functional.units import exponents_of, in_unit, unit_exponents
from lit_cka.functional.update_spectrum import effective_rank, singular_values_from_gram


@takes_arrays
def rankme(X: Tensor, *, centre: bool = False) -> float:
    """Returns the effective rank of features: `exp(H)` of their singular values, as shares of the sum.

        RankMe = exp(-sum_k p_k log p_k)          p_k = s_k / sum_l s_l

    1 for features on a line through 0, `min(n, d)` for equally long orthogonal ones. It grows with `n` until that is
    several times the width; compare numbers of the same `n`. The paper measures from 0, where a mean far off is one
    large direction; `centre=True` measures from the mean. The 1e-7 that the paper adds to each p_k, so that its
    logarithm is finite, is left out, since `0 log 0 = 0`.

    Args:
        X: features (n, d), any floating dtype; computed in float64.
        centre: measure the features from their mean.

    Returns:
        From 1 to min(n, d); NaN where all features are 0 (with `centre`: the same for all samples) or some not finite.

    Raises:
        ValueError: on integer features, another shape, or no samples.

    Example:
        >>> print(round(rankme(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])), 6))
        1.928623
    """
    if X.ndim != 2 or not X.is_floating_point() or not X.numel():
        raise ValueError(
            "Expected `X` to be floating point, of shape (samples, features), with at least one of each, "
            f"but got {X.dtype}, {tuple(X.shape)}."
        )
    x = X.detach().to(torch.float64)
    if centre:
        x = centred(in_unit(x, exponents_of(x)))
    largest = x.abs().amax()
    if not largest.isfinite():
        return math.nan
    return effective_rank(torch.linalg.svdvals(x * torch.exp2(-unit_exponents(largest))))


@takes_arrays
def rankme_from_gram(gram: Tensor) -> float:
    """Returns `rankme` from products of the features: the moments `X'X` (d, d), also centred ones, or `XX'` (n, n).

    For features that are held as sums over batches. Singular values below 1e-8 of the largest can't be told from 0 in a
    product, and are 0: on features with many directions of almost no variance the value may be lower than `rankme`.

    Args:
        gram: symmetric, positive semi-definite, any floating dtype; in any unit.

    Returns:
        As `rankme`.

    Raises:
        ValueError: unless the matrix is floating point and square.

    Example:
        >>> print(round(rankme_from_gram(torch.tensor([[2.0, 1.0], [1.0, 2.0]])), 6))
        1.928623
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point() or not gram.numel():
        raise ValueError(f"Expected `gram` to be a square matrix, floating point, but got {gram.dtype}, "
                         f"{tuple(gram.shape)}.")  # fmt: skip
    if not gram.isfinite().all():
        return math.nan
    return effective_rank(singular_values_from_gram(gram.detach().to(torch.float64)))
