"""The moments of an inner product of Gram matrices over all permutations of the samples, without permuting.

Kazi-Aoual, Hitier, Sabatier & Lebreton 1995, "Refined approximations to permutation tests for multivariate inference"
(Computational Statistics & Data Analysis 20): the first three moments of `tr(A B)`. Josse, Pages & Husson 2008,
"Testing the significance of the RV coefficient" (same journal, 53): the approximation by a Pearson type III
distribution. The RV coefficient is the plain linear CKA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays

MIN_NUM_SAMPLES = 6  # the third moment is a sum over six different samples


class PermutationMoments(NamedTuple):
    """What an inner product of matrices is on average over all permutations, and how it spreads. All float64 (a, b)."""

    mean: Tensor
    variance: Tensor
    skewness: Tensor


class _Invariants(NamedTuple):
    """What no permutation of the samples changes in a centred matrix of trace 0, each (a,)."""

    T2: Tensor  # tr(A^2)
    S2: Tensor  # sum_i A_ii^2
    cubic: Tensor  # (a, 5): S3, U, R, B, T3 of `_cubic_coefficients`


@takes_arrays
def permutation_moments(As: Tensor, Bs: Tensor) -> PermutationMoments:
    """Returns mean, variance and skewness of `sum_ij A_ij B_p(i)p(j)` over all `n!` permutations `p`, for every pair.

    For symmetric matrices whose rows sum to 0. With `H = I - 11'/n`, `A - tr(A) / (n - 1) H` has the trace 0, and its
    inner product with `B` differs from that of `A` by the same number for each permutation, the mean

        E = tr(A) tr(B) / (n - 1)

    so that what follows is of matrices with trace 0. With `T2 = tr(A^2)`, `S2 = sum_i A_ii^2` and a star for `B`

        Var = 2 T2 T2* / ((n+1)(n-2)) + (n(n+1) S2 - 2(n-1) T2) (n(n+1) S2* - 2(n-1) T2*) / ((n+1)n(n-1)(n-2)(n-3))

    and the third central moment is bilinear in five more invariants of each (Kazi-Aoual et al. 1995, section 3). Exact.
    For U-centred matrices, whose diagonal is 0, the variance of the cosine is `2 / (n (n - 3))`, whatever the features.

    Args:
        As: matrices (a, n, n), float64.
        Bs: matrices (b, n, n).

    Returns:
        mean, variance, skewness; the skewness is NaN where the variance is 0.

    Raises:
        ValueError: on fewer than 6 samples.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7])).double()
        >>> H = torch.eye(7, dtype=torch.float64) - 1 / 7
        >>> print(round(permutation_moments((H @ A @ H)[None], H[None]).mean.item(), 6))
        24.0
    """
    n = As.shape[-1]
    if n < MIN_NUM_SAMPLES:
        raise ValueError(
            f"Expected at least {MIN_NUM_SAMPLES} samples for the moments over permutations, but got {n}. Permute "
            "instead: so few samples have few permutations."
        )
    traces = [matrices.diagonal(dim1=1, dim2=2).sum(1) for matrices in (As, Bs)]
    (T2, S2, u), (T2s, S2s, us) = (
        _invariants(matrices, trace) for matrices, trace in zip((As, Bs), traces, strict=True)
    )
    spread, spread_s = n * (n + 1) * S2 - 2 * (n - 1) * T2, n * (n + 1) * S2s - 2 * (n - 1) * T2s
    variance = 2 * torch.outer(T2, T2s) / ((n + 1) * (n - 2))
    variance = variance + torch.outer(spread, spread_s) / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))
    variance = variance.clamp(min=0)
    third = u @ _cubic_coefficients(n).to(u) @ us.T
    return PermutationMoments(torch.outer(*traces) / (n - 1), variance, third / variance.pow(1.5))


def dominance(As: Tensor, Bs: Tensor) -> Tensor:
    """Returns how much one order of the samples stands out: that in which the largest sample of each side is the same.

        n / 2 max_i a_i max_j b_j,    a_i = sum_k A_ik^2 / sum_jk A_jk^2    with A of trace 0, as in the moments

    It happens in one of `n` orders, and adds about `sqrt(a_i b_j)` of the largest product that there may be, so that it
    gives the null this much variance in units of that of the debiased CKA, `2 / n^2`. A smooth distribution with the
    same moments then has its quantiles elsewhere.

    Args:
        As: matrices (a, n, n), float64, whose rows sum to 0.
        Bs: matrices (b, n, n).

    Returns:
        (a, b), in [1 / (2 n), n / 2]; NaN where a matrix is 0 but for its trace.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 30])).double()
        >>> H = torch.eye(8, dtype=torch.float64) - 1 / 8
        >>> print(round(dominance((H @ A @ H)[None], (H @ A @ H)[None]).item(), 2))
        2.25
    """
    n = As.shape[-1]
    return torch.outer(_largest_share(As), _largest_share(Bs)) * n / 2


def _largest_share(matrices: Tensor) -> Tensor:
    n = matrices.shape[-1]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    rows = torch.stack([(each - each.trace() / (n - 1) * (eye - 1 / n)).square().sum(dim=1) for each in matrices])
    return rows.amax(dim=1) / rows.sum(dim=1)


def _invariants(matrices: Tensor, traces: Tensor) -> _Invariants:
    n = matrices.shape[-1]
    eye = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    found = []
    for matrix, trace in zip(matrices, traces, strict=True):
        A = matrix - trace / (n - 1) * (eye - 1 / n)
        diagonal, square = A.diagonal(), A @ A
        S3, U = diagonal.pow(3).sum(), A.pow(3).sum()
        R, B, T3 = diagonal @ square.diagonal(), diagonal @ A @ diagonal, (square * A).sum()
        found.append(torch.stack([square.diagonal().sum(), diagonal.square().sum(), S3, U, R, B, T3]))
    stacked = torch.stack(found)
    return _Invariants(stacked[:, 0], stacked[:, 1], stacked[:, 2:])


def _cubic_coefficients(n: int) -> Tensor:
    """Returns what the third moment has of each two of the invariants (5, 5), symmetric.

    S3 = sum A_ii^3    U = sum A_ij^3    R = sum A_ii (A^2)_ii    B = sum A_ii A_ij A_jj    T3 = tr(A^3)
    """
    S3_U, S3_R = -2 * n * (n - 1) * (n**2 - n + 4), -12 * n * (n - 1) ** 2 * (n + 4)
    coefficients = {
        (0, 0): n**2 * (n + 1) * (n**2 + 15 * n - 4),
        (0, 1): 2 * S3_U,
        (0, 2): S3_R,
        (0, 3): 3 * S3_U,
        (0, 4): 16 * n * (n - 1) * (n - 2),
        (1, 1): 4 * (n**4 - 8 * n**3 + 19 * n**2 - 4 * n - 16),
        (1, 2): 24 * (n**3 - 3 * n**2 - 2 * n + 8),
        (1, 3): 24 * (n**2 - n - 4),
        (1, 4): -8 * (3 * n**2 - 15 * n + 16),
        (2, 2): 12 * (n**4 - n**3 - 8 * n**2 + 36 * n - 48),
        (2, 3): 24 * (n**3 - 2 * n**2 - 3 * n + 12),
        (2, 4): -8 * (n - 2) * (3 * n**2 - 15 * n + 24),
        (3, 3): 6 * (n**4 - 8 * n**3 + 21 * n**2 - 6 * n - 24),
        (3, 4): -8 * (3 * n**2 - 15 * n + 24),
        (4, 4): 8 * (n**3 - 9 * n**2 + 26 * n - 22),
    }
    table = torch.zeros(5, 5, dtype=torch.float64)
    orders = n * (n - 1) * (n - 2) * (n - 3) * (n - 4) * (n - 5)
    for (row, column), value in coefficients.items():
        table[row, column] = table[column, row] = value / orders
    return table
