"""The unit that features are measured in: a power of two, chosen so that their fourth powers, which CKA is made of,
neither overflow nor vanish.

CKA is the same in any unit, and a power of two costs no digit. Features of a usual size are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_USUAL = 20  # magnitudes up to 2^20, and down to its inverse, leave float64 room for fourth powers
_MOST = 1000  # 2^1000 and its inverse are numbers of float64; what is left beyond does no harm


def unit_exponents(sizes: Tensor) -> Tensor:
    """Returns the powers of two that features as large as `sizes` (...) are to be divided by, whole numbers in float64.

    0 where they are of a usual size, and where they are 0, infinite or NaN.
    """
    exponents = torch.frexp(sizes.to(torch.float64)).exponent.to(torch.float64).clamp(-_MOST, _MOST)
    return exponents.masked_fill((exponents.abs() <= _USUAL) | ~sizes.isfinite(), 0.0)


def unit_exponent(size: float) -> int:
    """Returns `unit_exponents` of one size."""
    return int(unit_exponents(torch.tensor(size, dtype=torch.float64)))


def exponents_of(X: Tensor) -> Tensor:
    """Returns the exponents (...) of the unit for features `X` (..., n, d), by how far they are from the first sample.

    A feature that is the same for all samples may be as large as it likes. Where all are, their own size counts.
    """
    if not X.shape[-2] or not X.shape[-1]:
        return torch.zeros(X.shape[:-2], dtype=torch.float64, device=X.device)
    first = X[..., :1, :]
    spread = (X - first).abs_().amax(dim=(-2, -1))
    return unit_exponents(torch.where(spread == 0, first.abs().amax(dim=(-2, -1)), spread))


def in_unit(X: Tensor, exponents: Tensor) -> Tensor:
    """Returns float64 features `X` (..., n, d) divided by two to the power of `exponents` (...)."""
    return X * torch.exp2(-exponents)[..., None, None]


def in_usual_unit(X: Tensor) -> Tensor:
    """Returns features `X` (..., n, d), any floating dtype, in float64 and in their unit."""
    X = X.detach().to(torch.float64)
    return in_unit(X, exponents_of(X))


def common_exponent(exponents: Tensor, spreads: Tensor) -> Tensor:
    """Returns the largest of the exponents (p, ...) of those whose features vary; 0 where none do."""
    varying = exponents.masked_fill(spreads == 0, -torch.inf).amax(dim=0)
    return varying.masked_fill(varying.isinf(), 0.0)
