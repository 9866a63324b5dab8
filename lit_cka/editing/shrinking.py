"""The one factor that shrinks the update of a whole model as much as MonoSoup does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lit_cka.editing.parameter import why_left_alone
from lit_cka.editing.settings import EditSettings
from lit_cka.functional.spectral import spectral_split


def norms_of_update(W0: Tensor | None, W1: Tensor, settings: EditSettings) -> tuple[float, float]:
    """Returns the squared norms of an update, as MonoSoup leaves it and as it is; 0 of what MonoSoup leaves alone."""
    if why_left_alone(W0, W1) is not None:
        return 0.0, 0.0
    assert W0 is not None
    split = spectral_split(W0, W1, rule=settings.rule, R=settings.R, min_rel_update=settings.min_rel_update)
    if isinstance(split, float):
        return 0.0, 0.0
    size = (split.relative_change * W0.double().norm().item()) ** 2
    return split.coefficients.kept**2 * size, size


def shrink_factor(norms: Sequence[tuple[float, float]]) -> float:
    """Returns the one factor that leaves the update of a whole model the norm that MonoSoup leaves it."""
    kept, all_of_it = (math.fsum(each) for each in zip(*norms, strict=True)) if norms else (0.0, 0.0)
    return math.sqrt(kept / all_of_it) if all_of_it else 1.0
