"""MonoSoup: the split of one weight's update by its singular values, and the weights that follow from it.

Abdollahpoorrostam et al. 2026, "Model soups need only one ingredient" (arXiv 2602.09689). With `W0` the pretrained and
`W1` the fine-tuned weight, each as a matrix (out, rest), `Delta = W1 - W0 = U S V'`, and `k` by a rank rule:

    P_k = sum_{i<=k} s_i^2 / sum s_i^2           rho = (s_{k+1} / s_1)^2, 0 when k is the full rank
    lambda_low = rho + (1 - rho) sqrt(1 - P_k)   lambda_high = 1 - lambda_low
    W = W0 + lambda_high Delta_high + lambda_low Delta_low

Only the singular values and the projector on the first `k` directions are needed. Both come from the eigenvectors `Q`
of the smaller Gram matrix, `G = Delta Delta'` or `Delta' Delta`: `Delta_high = Q_k Q_k' Delta`. They are computed in
float32 where that changes neither `k` nor the weights by more than 6e-6 (see `float32_spectrum`), else in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.float32_spectrum import SMALLEST, errors_by, first_directions, float32_spectrum
from lit_cka.functional.precision import FullFloat32, has_fast_float64
from lit_cka.functional.rank_rules import (
    RULES,
    RankRule,
    check_rule,
    is_energy_doubtful,
    is_rank_doubtful,
    split_rank,
)
from lit_cka.functional.update_gram import check_shapes, gram_of_update, update
from lit_cka.functional.update_parts import write_weighted
from lit_cka.functional.update_spectrum import rows_are_fewer

_TOLERANCE = 6e-6  # of edited weights, relative
_TINY = 1e-20  # squares of an update that float32 has room for are between this and its inverse


class Coefficients(NamedTuple):
    """What the split of one update is weighted by; all in [0, 1]."""

    energy: float  # P_k
    rho: float
    lambda_high: float
    lambda_low: float

    @property
    def kept(self) -> float:
        """How much of the update's norm MonoSoup leaves, a share."""
        return math.sqrt(self.lambda_high**2 * self.energy + self.lambda_low**2 * (1 - self.energy))


def coefficients(singular_values: Tensor, k: int) -> Coefficients:
    """Returns the weights of the high part (the first `k` singular values) and of the low part of an update."""
    energies = singular_values.detach().to(torch.float64).square()
    total, tail = energies.sum().item(), energies[k:].sum().item()  # not 1 - P_k, which cancels
    rho = (energies[k] / energies[0]).item() if k < len(energies) else 0.0
    low = rho + (1 - rho) * math.sqrt(tail / total)
    return Coefficients(1 - tail / total, rho, 1 - low, low)


class SpectralSplit(NamedTuple):
    """The split of one update; `edited_weights` applies it.

    `basis` (m, j) spans, in the space of the smaller side of the matrix (`rows`: its rows, else its columns), the first
    `k` directions, or (`complement`) all the others, whichever are fewer.
    """

    rank: int  # k
    num_singular_values: int
    coefficients: Coefficients
    relative_change: float  # ||Delta||_F / ||W0||_F
    basis: Tensor
    rows: bool
    complement: bool

    def edited_weights(
        self, W0: Tensor, W1: Tensor, weights: Sequence[tuple[float, float]], *, overwrite: bool = False
    ) -> list[Tensor]:
        """Returns `W0 + high Delta_high + low Delta_low` for each `(high, low)`, in the shape, dtype and place of `W1`.

        Computed in float32, or float64 if `W1` is. With `overwrite`, the last of them takes the memory of `W1`.
        """
        into_W1 = overwrite and W1.is_contiguous()
        new = [torch.empty_like(W1, memory_format=torch.contiguous_format) for _ in weights[into_W1:]]
        out = new + [W1] * into_W1
        outside_first = [(high, low) if self.complement else (low, high) for high, low in weights]
        write_weighted(out, W0, W1, self.basis.to(_dtype(W1)), outside_first, rows=self.rows)
        return out


@takes_arrays
def spectral_split(
    W0: Tensor, W1: Tensor, *, rule: RankRule = "effective_rank", R: float = 0.9, min_rel_update: float = 0.0
) -> SpectralSplit | float:
    """Split the update of one weight by its singular values.

    Args:
        W0: pretrained weight of two or more dimensions, (out, ...); read as a matrix (out, rest).
        W1: fine-tuned weight of the same shape, both floating point.
        rule: see `split_rank`.
        R: see `split_rank`.
        min_rel_update: the smallest relative change to split.

    Returns:
        The split; or just the relative change `||Delta||_F / ||W0||_F` where that is 0 or below `min_rel_update`.

    Raises:
        ValueError: on other shapes or dtypes, NaN or infinity, an unknown rule, or `R` outside (0, 1].

    Example:
        >>> W0, W1 = torch.zeros(2, 3), torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> split = spectral_split(W0, W1, rule="energy", R=0.9)
        >>> print(split.rank, [round(value, 3) for value in split.coefficients])
        1 [0.9, 0.111, 0.608, 0.392]
    """
    check_rule(rule, R)
    _check_weights(W0, W1)
    rows = rows_are_fewer(W1)
    small = len(W1) if rows else W1[0].numel()
    # A GPU that is fast at float64 takes as long for eigenvectors in float32.
    in_float64 = W1.device.type != "cpu" and has_fast_float64(W1.device)
    if small >= SMALLEST and not in_float64 and torch.float64 not in (W0.dtype, W1.dtype):
        split = _split_in_float32(W0, W1, rows, rule, R, min_rel_update)
        if split is not None:
            return split
    gram, norm = gram_of_update(W0, W1, rows)
    total = gram.trace().item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise ValueError("Expected finite weights, but got NaN or infinity.")
    change = math.sqrt(total / norm) if norm else (math.inf if total else 0.0)
    if total == 0 or change < min_rel_update:
        return change
    eigenvalues, Q = torch.linalg.eigh(gram)  # ascending
    s = _singular_values(eigenvalues, W0, W1, rule)
    k = split_rank(s, rule, R)
    complement = 2 * k > len(s)
    basis = Q[:, : len(s) - k] if complement else Q[:, len(s) - k :]
    return SpectralSplit(k, len(s), coefficients(s, k), change, basis.contiguous(), rows, complement)


def _split_in_float32(
    W0: Tensor, W1: Tensor, rows: bool, rule: RankRule, R: float, min_rel_update: float
) -> SpectralSplit | float | None:
    """Returns the split by sums in float32; None where float64 could give another `k`, or weights that differ by more
    than `_TOLERANCE`.
    """
    with FullFloat32(W1.device.type):
        gram, norm = gram_of_update(W0, W1, rows, torch.float32)
        total = gram.trace().item()
        if not (_TINY < total < 1 / _TINY and _TINY < norm < math.inf):
            return None
        change = math.sqrt(total / norm)
        if change < min_rel_update:
            return change
        spectrum = float32_spectrum(gram)
    if spectrum is None:
        return None
    s = spectrum.singular_values
    k = split_rank(s, rule, R)
    if RULES[rule] == "energy":
        is_doubtful = is_energy_doubtful(s, k, R, float(spectrum.energy_errors.sum()))
    else:
        is_doubtful = is_rank_doubtful(s, spectrum.errors)
    tail, slack = (
        float(each[k:].sum()) / total for each in (s.square(), spectrum.energy_errors)
    )  # lambda has the root
    if is_doubtful or min(slack / (2 * math.sqrt(max(tail, 1e-300))), math.sqrt(slack)) > _TOLERANCE:
        # The directions may still do: values alone take half of the time.
        s = _singular_values(torch.linalg.eigvalsh(gram_of_update(W0, W1, rows)[0]), W0, W1, rule)
        k = split_rank(s, rule, R)
    directions = first_directions(spectrum, k, _TOLERANCE / change)
    if directions is None:
        return None
    basis, complement = directions
    return SpectralSplit(k, len(s), coefficients(s, k), change, basis, rows, complement)


def _singular_values(eigenvalues: Tensor, W0: Tensor, W1: Tensor, rule: RankRule) -> Tensor:
    """Returns the singular values of an update by its Gram matrix's eigenvalues, ascending and in float64, or by an SVD
    where that could give another `k`.
    """
    s = eigenvalues.flip(0).clamp_min(0).sqrt()
    # An eigenvalue is right to about `eps s_1^2 sqrt(m)`, so that a singular value far below `s_1` is not.
    noise = 4 * torch.finfo(torch.float64).eps * math.sqrt(len(s)) * float(s[0]) ** 2
    if RULES[rule] == "effective_rank" and is_rank_doubtful(s, errors_by(noise, s)):
        s = torch.linalg.svdvals(update(W0, W1))
    return s


@takes_arrays
def low_rank_split(
    B: Tensor, A: Tensor, *, W0_norm: float, rule: RankRule = "effective_rank", R: float = 0.9
) -> SpectralSplit | float:
    """Returns `spectral_split` of an update `Delta = B A` (LoRA, its scale in either factor) from the factors alone.

    Two QR decompositions and the SVD of the small (r, r) core in float64 take the place of the Gram matrix.

    Args:
        B: (out, r).
        A: (r, rest).
        W0_norm: Frobenius norm of the pretrained weight, for the relative change.
        rule: see `split_rank`.
        R: see `split_rank`.

    Raises:
        ValueError: on factors that don't fit, NaN or infinity, an unknown rule, or `R` outside (0, 1].

    Example:
        >>> import torch
        >>> B, A = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.eye(2, 6)
        >>> split = low_rank_split(B, A, W0_norm=10.0)
        >>> split.num_singular_values, split.rank <= 2
        (6, True)
    """
    check_rule(rule, R)
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"Expected `B` (out, r) and `A` (r, rest), but got {tuple(B.shape)} and {tuple(A.shape)}.")
    if not bool(torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise ValueError("Expected finite weights, but got NaN or infinity.")
    Q_B, R_B = torch.linalg.qr(B.detach().to(torch.float64))
    Q_A, R_A = torch.linalg.qr(A.detach().to(torch.float64).T)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.T)
    total = s.square().sum().item()
    change = math.sqrt(total) / W0_norm if W0_norm else (math.inf if total else 0.0)
    if total == 0:
        return change
    s = torch.cat([s, s.new_zeros(min(len(B), A.shape[1]) - len(s))])
    k = split_rank(s, rule, R)
    rows = len(B) <= A.shape[1]
    basis = (Q_B @ U if rows else Q_A @ Vh.T)[:, :k]
    return SpectralSplit(k, len(s), coefficients(s, k), change, basis.contiguous(), rows, complement=False)


def _dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _check_weights(W0: Tensor, W1: Tensor) -> None:
    check_shapes(W0, W1)
    if not (W0.is_floating_point() and W1.is_floating_point()):
        raise ValueError(f"Expected floating-point weights, but got {W0.dtype} and {W1.dtype}.")
