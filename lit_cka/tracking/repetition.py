"""Whether a model gives the same features for the same samples: `copied_batch`, `lowest_score`, `lowest_cka`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_cka.functional.cka import linear_cka
from lit_cka.reference.arguments import CopyError, private_copy


def copied_batch(batch: Any) -> Any | None:
    """Return a copy of a batch, to run it a second time; None where it can't be copied."""
    try:
        return private_copy(batch)
    except CopyError:
        return None


def lowest_score(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[str | None, float]:
    """Return the layer that differs most between two runs on one batch, and its CKA; (None, 1.0) if none differs."""
    lowest: tuple[str | None, float] = (None, 1.0)
    for name in first.keys() & second.keys():
        X, Y = first[name], second[name]
        # What another order of summation changes is no difference.
        tolerance = 1e-6 * float(X.nan_to_num(0.0, 0.0, 0.0).abs().max()) if X.numel() else 0.0
        same = X.shape == Y.shape and torch.allclose(X, Y, rtol=1e-5, atol=tolerance, equal_nan=True)
        if same:
            continue
        score = linear_cka(X, Y).item() if X.shape == Y.shape and len(X) > 1 else float("nan")
        if lowest[0] is None or not score >= lowest[1]:
            lowest = (name, score)
    return lowest


def lowest_cka(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str | None, float]:
    """Return the layer with the lowest CKA between features of the same samples; (None, 1.0) where none is defined."""
    scores = {name: linear_cka(X, Y).item() for name, (X, Y) in pairs.items()}
    defined = {name: score for name, score in scores.items() if score == score}
    name = min(defined, key=defined.__getitem__, default=None)
    return name, 1.0 if name is None else defined[name]
