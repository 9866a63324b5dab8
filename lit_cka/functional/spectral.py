"""MonoSoup: the split of one weight's update by its singular values, and the weights that follow from it.

Abdollahpoorrostam et al. 2026, "Model soups need only one ingredient" (arXiv 2602.09689). With `W0` the pretrained and
`W1` the fine-tuned weight, each as a matrix (out, rest), `Delta = W1 - W0 = U S V'`, and `k` by a rank rule:

    P_k = sum_{i<=k} s_i^2 / sum s_i^2           rho = (s_{k+1} / s_1)^2, 0 when k is the full rank
    lambda_low = rho + (1 - rho) sqrt(1 - P_k)   lambda_high = 1 - lambda_low
    W = W0 + lambda_high Delta_high + lambda_low Delta_low

Only the singular values and the projector on the first `k` directions are needed. Both come from the eigenvectors `Q`
of the smaller Gram matrix, `G = Delta Delta'` or `Delta' Delta`, in float64: `Delta_high = Q_k Q_k' Delta`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.update_gram import as_matrix, chunks, gram_of_update, narrowed, update
from lit_cka.functional.update_spectrum import effective_rank, rows_are_fewer

RankRule: TypeAlias = Literal["effective_rank", "freevariance", "vetterli", "energy", "variance"]
RULES: dict[str, str] = {
    "effective_rank": "effective_rank",
    "freevariance": "effective_rank",
    "vetterli": "effective_rank",
    "energy": "energy",
    "variance": "energy",
}
_TIE = 1e-9  # an effective rank this close above a whole number is that number: rounding put it there


class Coefficients(NamedTuple):
    """What the split of one update is weighted by; all in [0, 1]."""

    energy: float  # P_k
    rho: float
    lambda_high: float
    lambda_low: float


def check_rule(rule: str, R: float) -> None:
    """Raise a ValueError unless `rule` is known and `R` is a share of the energy."""
    if rule not in RULES:
        raise ValueError(f"Expected `rule` to be one of {', '.join(map(repr, RULES))}, but got {rule!r}.")
    if not 0 < R <= 1:
        raise ValueError(f"Expected `R`, a share of the energy, to be in (0, 1], but got {R}.")


@takes_arrays
def split_rank(singular_values: Tensor, rule: RankRule = "effective_rank", R: float = 0.9) -> int:
    """Returns how many singular values make up the high part of an update.

        effective_rank   ceil(exp(H)), H = -sum p_i log p_i, p_i = s_i / sum s  (Roy & Vetterli 2007)
        energy           the smallest k with sum_{i<=k} s_i^2 >= R sum s_i^2

    Args:
        singular_values: (m,), descending, not all zero.
        rule: "effective_rank" (alias "freevariance", "vetterli") or "energy" (alias "variance").
        R: share of the energy, in (0, 1]; for "energy" alone.

    Returns:
        k, from 1 to m.
    """
    check_rule(rule, R)
    s = singular_values.detach().to(torch.float64)
    if RULES[rule] == "energy":
        energies = s.square().cumsum(0)
        return min(int((energies < R * (1 - 1e-12) * energies[-1]).sum().item()) + 1, len(s))
    return min(max(math.ceil(effective_rank(s) * (1 - _TIE)), 1), len(s))


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
        new = weights[1:] if into_W1 else weights
        out = [torch.empty_like(W1, memory_format=torch.contiguous_format) for _ in new] + [W1] * into_W1
        flat = [as_matrix(edited) for edited in out]
        dtype = _dtype(W1)
        basis = self.basis.to(dtype)
        for start, stop in chunks(as_matrix(W1), self.rows):
            w0, w1 = (narrowed(as_matrix(W), start, stop, self.rows).to(dtype) for W in (W0, W1))
            delta = (w1 - w0).contiguous()  # whose products are the same bits then, however the weights lie in memory
            part = basis @ (basis.T @ delta) if self.rows else (delta @ basis) @ basis.T
            for target, (high, low) in zip(flat, weights, strict=True):
                outside, inside = (high, low) if self.complement else (low, high)  # of what `basis` spans
                into = narrowed(target, start, stop, self.rows)
                base = w0 if outside == 0 else w1 if outside == 1 else torch.add(w0, delta, alpha=outside)
                if into.dtype == dtype:
                    torch.add(base, part, alpha=inside - outside, out=into)
                else:
                    into.copy_(torch.add(base, part, alpha=inside - outside))
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
    gram, norm = gram_of_update(W0, W1, rows)
    total = gram.trace().item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise ValueError("Expected finite weights, but got NaN or infinity.")
    change = math.sqrt(total / norm) if norm else (math.inf if total else 0.0)
    if total == 0 or change < min_rel_update:
        return change
    eigenvalues, Q = torch.linalg.eigh(gram)  # ascending
    s = eigenvalues.flip(0).clamp_min(0).sqrt()
    if RULES[rule] == "effective_rank" and _is_doubtful(s):
        s = torch.linalg.svdvals(update(W0, W1))
    k = split_rank(s, rule, R)
    complement = 2 * k > len(s)
    basis = Q[:, : len(s) - k] if complement else Q[:, len(s) - k :]
    return SpectralSplit(k, len(s), coefficients(s, k), change, basis.contiguous(), rows, complement)


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


def _is_doubtful(s: Tensor) -> bool:
    """Returns whether what rounding in the Gram matrix does to small singular values could change the effective rank.

    An eigenvalue is right to about `eps s_1^2 sqrt(m)`, so that a singular value far below `s_1` is not.
    """
    noise = 4 * torch.finfo(torch.float64).eps * math.sqrt(len(s)) * s[0].square()
    error = torch.minimum(noise / (2 * s.clamp_min(1e-300)), noise.sqrt())
    p, slack = s / s.sum(), error / s.sum()
    # dH/dp_i = -log p_i + const; below, p log p grows at most as fast as at the slack itself.
    doubt = (slack * (1 - torch.log(torch.maximum(p, slack).clamp_min(1e-300)))).sum().item()
    low, high = effective_rank(s) * math.exp(-doubt), effective_rank(s) * math.exp(doubt)
    return math.ceil(low * (1 - _TIE)) != math.ceil(high * (1 - _TIE))


def _dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _check_weights(W0: Tensor, W1: Tensor) -> None:
    if W0.shape != W1.shape or W1.ndim < 2 or W1.numel() == 0:
        raise ValueError(
            "Expected `W0` and `W1` to be weights of the same shape, of two or more dimensions, "
            f"but got {tuple(W0.shape)} and {tuple(W1.shape)}."
        )
    if not (W0.is_floating_point() and W1.is_floating_point()):
        raise ValueError(f"Expected floating-point weights, but got {W0.dtype} and {W1.dtype}.")
