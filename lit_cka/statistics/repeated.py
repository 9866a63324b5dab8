"""Samples that come up more than once, where numbers are for independent ones: how many, and what to say of it."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 0.05  # as a share, repeated samples make an interval no more than 3 % too narrow
_SAME = 1e-10  # a squared distance, next to the mean one from the centre: what rounding in float32 leaves of 0


def num_repeated(K: Tensor) -> Tensor:
    """Returns how many samples (...) have the features of an earlier one, from Gram matrices (..., m, m)."""
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    distances = diagonal[..., :, None] + diagonal[..., None, :] - 2 * K
    same = distances <= _SAME * diagonal.mean(-1)[..., None, None]
    return same.tril(-1).any(-1).sum(-1)


def num_repeated_rows(X: Tensor) -> int:
    """Returns the same from features (n, d), in O(n d + n log n): equal rows are neighbours along any direction.

    Example:
        >>> num_repeated_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]))
        2
    """
    centred = X.double() - X.double().mean(dim=0)
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(X.shape[1], dtype=torch.float64, generator=generator, device="cpu")
    ordered = centred[(centred @ direction.to(centred.device)).argsort()]
    distances = ordered.diff(dim=0).square().sum(dim=1)
    return int((distances <= _SAME * centred.square().sum(dim=1).mean()).sum())


def repeated_text(num_samples: int, num_same: int, where: str, *, whose: str, too_sure: str) -> str | None:
    """Returns a sentence on repeated samples, or None for few.

    Args:
        num_samples: that were looked at.
        num_same: of them, that have the features of another one.
        where: they are.
        whose: layers.
        too_sure: what is, and how.
    """
    if num_same <= FEW * num_samples:
        return None
    return (
        f"{num_same} of {num_samples} samples of {where} have the features of another one in every layer of {whose}. "
        f"If they repeat it, {too_sure}: they are for independent samples."
    )
