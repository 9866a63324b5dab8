"""The scalars that linear CKA comes down to, whichever way they are computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.centring import is_constant
from lit_cka.functional.moments import PairedMoments


class CKATerms(NamedTuple):
    """Sums over `n` paired samples about their means, for `cka_from_terms`: float64 scalars.

    The first three are `||Xc' Yc||_F^2` and so on, which equal the sums over the products of the Gram matrices
    `K = Xc Xc'` and `L = Yc Yc'`; `a_i` and `b_i` are the diagonals of these, the squared norms of the samples. CKA
    does not change if all `X`, or all `Y`, are in another unit.

    Example:
        >>> import torch
        >>> X, Y = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> from lit_cka.functional import Rows, sample_space_terms
        >>> terms = sample_space_terms(Rows([X]), Rows([X]))
        >>> bool(torch.allclose(terms.xy, terms.xx))  # of features with themselves
        True
    """

    n: Tensor  # number of samples
    xy: Tensor  # sum K_ij L_ij
    xx: Tensor  # sum K_ij^2
    yy: Tensor  # sum L_ij^2
    a: Tensor  # sum a
    b: Tensor  # sum b
    aa: Tensor  # sum a^2
    bb: Tensor  # sum b^2
    ab: Tensor  # sum a b
    varies_x: Tensor  # 0 where the features are constant but for rounding, see `is_constant`
    varies_y: Tensor


def terms_from_moments(moments: PairedMoments) -> CKATerms:
    """Returns the terms of the samples that `moments` describe."""
    xy, xx, yy = (matrix.square().sum() for matrix in (moments.xy, moments.xx, moments.yy))
    n, a, b = moments.n, moments.a, moments.b
    constant_x = is_constant(moments.xx.diagonal(), n, moments.mean_x)
    # Without the sums over y alone, those who know them have to say.
    constant_y = is_constant(moments.yy.diagonal(), n, moments.mean_y) if moments.yy.numel() else b == 0
    varies = (~constant_x).to(torch.float64), (~constant_y).to(torch.float64)
    return CKATerms(n, xy, xx, yy, a, b, moments.aa, moments.bb, moments.ab, *varies)
