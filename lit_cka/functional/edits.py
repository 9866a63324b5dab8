"""Edits of one fine-tuned weight other than MonoSoup: each a pure function of `W0`, `W1` and its options.

`W0` is the pretrained and `W1` the fine-tuned weight, floating point and of one shape, `Delta = W1 - W0`. What comes
back has the dtype of `W1`, and is computed in float32, or in float64 if `W1` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.precision import FullFloat32
from lit_cka.functional.rank_rules import RankRule
from lit_cka.functional.spectral import spectral_split
from lit_cka.functional.update_gram import as_matrix, check_shapes, gram_of_update
from lit_cka.functional.update_spectrum import rows_are_fewer

_POINTS = 20_001  # of the numerical integral


@takes_arrays
def wise_ft(W0: Tensor, W1: Tensor, *, alpha: float) -> Tensor:
    """Returns `(1 - alpha) W0 + alpha W1` (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    Args:
        W0: pretrained.
        W1: fine-tuned.
        alpha: 0 is pretrained, 1 fine-tuned; any finite number.

    Example:
        >>> import torch
        >>> W0, W1 = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> wise_ft(W0, W1, alpha=0.5).tolist()
        [[1.5, 0.0], [0.0, 0.5]]
    """
    if not math.isfinite(alpha):
        raise ValueError(f"Expected `alpha` to be a finite number, but got {alpha}.")
    start = W0.to(_dtype(W1))
    return torch.add(start, W1.to(start.dtype) - start, alpha=alpha).to(W1.dtype)


@takes_arrays
def lines(W0: Tensor, W1: Tensor, *, alpha: float, beta: float, depth: float | None) -> Tensor:
    """Returns `W0 + (alpha + beta depth) Delta` (LiNeS, Wang et al. 2024, arXiv 2410.17146).

    Shallow blocks, which hold general features, keep less of the update than deep ones.

    Args:
        W0: pretrained.
        W1: fine-tuned.
        alpha: scale in the first block.
        beta: what it grows by up to the last block.
        depth: of the weight's block, from 0 for the first to 1 for the last; None outside of the blocks, which are
            scaled by `alpha` as in the authors' code.

    Example:
        >>> import torch
        >>> W0, W1 = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> lines(W0, W1, alpha=0.5, beta=0.5, depth=1.0).tolist()  # of the last block, all of it
        [[3.0, 0.0], [0.0, 1.0]]
    """
    return wise_ft(W0, W1, alpha=alpha + beta * (depth or 0.0))


@takes_arrays
def trim(W0: Tensor, W1: Tensor, *, density: float) -> Tensor:
    """Returns `W0` and the elements of the update that are largest in magnitude (TIES' trimming, Yadav et al. 2023,
    arXiv 2306.01708), here of each weight by itself.

    Args:
        W0: pretrained.
        W1: fine-tuned.
        density: share of the elements that are kept, in [0, 1], rounded to a whole number of them.

    Example:
        >>> import torch
        >>> W0, W1 = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> trim(W0, W1, density=0.25).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    _check_share("density", density)
    kept = round(density * W1.numel())
    values = W1.flatten()
    if kept == W1.numel():
        return W1.clone()
    result: Tensor = W0.to(W1.dtype).clone().flatten()
    if kept:
        delta = values.to(_dtype(W1)) - W0.flatten().to(_dtype(W1))
        indices = torch.topk(delta.abs(), kept, sorted=False).indices
        result[indices] = values[indices]
    return result.view(W1.shape)


@takes_arrays
def dare(W0: Tensor, W1: Tensor, *, drop: float, seed: int) -> Tensor:
    """Returns `W0 + m Delta / (1 - drop)`, with `m` 0 at random for a share of the elements and 1 for the others (DARE,
    Yu et al. 2024, arXiv 2311.03099).

    Args:
        W0: pretrained.
        W1: fine-tuned.
        drop: probability of an element of the update to be dropped, in [0, 1).
        seed: of the random numbers, which come from the CPU whatever the device is.

    Example:
        >>> import torch
        >>> W1 = torch.ones(1000)
        >>> edited = dare(torch.zeros(1000), W1, drop=0.5, seed=0)
        >>> edited.unique().tolist()  # dropped, or rescaled
        [0.0, 2.0]
    """
    _check_share("drop", drop)
    if drop == 1:
        raise ValueError("Expected `drop` to be below 1, but got 1: nothing would be left to rescale.")
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(W1.shape, generator=generator) >= drop).to(W1.device)
    start = W0.to(_dtype(W1))
    delta = (W1.to(start.dtype) - start) * mask
    return torch.add(start, delta, alpha=1 / (1 - drop)).to(W1.dtype)


@takes_arrays
def dg_hard(W0: Tensor, W1: Tensor) -> Tensor:
    """Returns `W0` and the directions of the update whose singular value is above the optimal hard threshold for
    matrices in noise of unknown size (Gavish & Donoho 2014, arXiv 1305.5870, eq. 12): `omega(m / n)` times the median.

    Known as DG-Hard (arXiv 2605.20296). Where no singular value is above, `W0` is left.

    Args:
        W0: pretrained, of two or more dimensions, read as a matrix (out, rest).
        W1: fine-tuned.

    Raises:
        ValueError: on other shapes, NaN or infinity.

    Example:
        >>> import torch
        >>> noise = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
        >>> W = dg_hard(torch.zeros(20, 20), torch.ones(20, 20) + 0.01 * noise)
        >>> int(torch.linalg.matrix_rank(W, rtol=1e-5))  # one direction, without the noise
        1
    """
    check_shapes(W0, W1)
    rows = rows_are_fewer(W1)
    gram, _ = gram_of_update(W0, W1, rows)
    eigenvalues, Q = torch.linalg.eigh(gram)
    s = eigenvalues.clamp_min(0).sqrt()
    if not bool(torch.isfinite(s).all()):
        raise ValueError("Expected finite weights, but got NaN or infinity.")
    m, n = sorted(as_matrix(W1).shape)
    basis = Q[:, s > hard_threshold(m, n) * s.quantile(0.5)].to(_dtype(W1))
    start = as_matrix(W0).to(_dtype(W1))
    delta = as_matrix(W1).to(start.dtype) - start
    with FullFloat32(W1.device.type):
        high = basis @ (basis.T @ delta) if rows else (delta @ basis) @ basis.T
    edited: Tensor = start + high
    return edited.to(W1.dtype).view(W1.shape)


def hard_threshold(m: int, n: int) -> float:
    """Returns `omega(beta) = lambda(beta) / sqrt(mu_beta)`, `beta = m / n <= 1`, by which the median singular value is
    multiplied (Gavish & Donoho 2014, eq. 11).

        lambda(beta)^2 = 2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1))
        mu_beta        the median of the Marchenko-Pastur distribution

    Example:
        >>> print(round(hard_threshold(1000, 1000), 3))
        2.858
    """
    beta = m / n
    squared = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = low + (high - low) sin(t)^2 takes the roots out of the density, sqrt((high - x)(x - low)) / (2 pi beta x).
    t = torch.linspace(0, math.pi / 2, _POINTS, dtype=torch.float64)
    x = low + (high - low) * t.sin().square()
    density = (high - low) ** 2 * (2 * t).sin().square() / x.clamp_min(1e-300)
    density[0] = 0.0 if low > 0 else 4 * (high - low)
    mass = torch.cumulative_trapezoid(density, t)
    median = int(torch.searchsorted(mass, mass[-1:] / 2))
    before, after = float(mass[median - 1]), float(mass[median])
    share = (float(mass[-1]) / 2 - before) / (after - before)
    return math.sqrt(squared / float(x[median] + share * (x[median + 1] - x[median])))


@takes_arrays
def shrink(
    W0: Tensor, W1: Tensor, *, rule: RankRule = "effective_rank", R: float = 0.8, min_rel_update: float = 0.0
) -> Tensor:
    """Returns `W0 + c Delta`, with the `c` that leaves the update the norm that MonoSoup leaves it: the control that
    tells what MonoSoup gains by the directions it chooses.

        c^2 = lambda_high^2 P_k + lambda_low^2 (1 - P_k)

    Args:
        W0: pretrained, of two or more dimensions, read as a matrix (out, rest).
        W1: fine-tuned.
        rule: of MonoSoup, see `spectral_split`.
        R: likewise.
        min_rel_update: likewise; what MonoSoup leaves alone, with a smaller relative change, is left alone here.

    Example:
        >>> import torch
        >>> W1 = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        >>> factors = shrink(torch.zeros(8, 8), W1) / W1
        >>> bool(factors.std() < 1e-5), bool(factors.mean() < 1)  # the same for all elements
        (True, True)
    """
    split = spectral_split(W0, W1, rule=rule, R=R, min_rel_update=min_rel_update)
    return W1.clone() if isinstance(split, float) else wise_ft(W0, W1, alpha=split.coefficients.kept)


@takes_arrays
def shrink_by(W0: Tensor, W1: Tensor, *, factor: float) -> Tensor:
    """Returns `W0 + factor Delta`: one factor for all weights that MonoSoup edits.

    Args:
        W0: pretrained.
        W1: fine-tuned.
        factor: the share of the whole model's update, by its norm, that MonoSoup leaves.

    Example:
        >>> import torch
        >>> W0, W1 = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> shrink_by(W0, W1, factor=0.5).tolist()
        [[1.5, 0.0], [0.0, 0.5]]
    """
    return wise_ft(W0, W1, alpha=factor)


@takes_arrays
def uniform_soup(W0: Tensor, W1: Tensor, *, others: Sequence[Tensor]) -> Tensor:
    """Returns the mean of `W1` and `others` (Wortsman et al. 2022, arXiv 2203.05482), summed up in float64.

    Args:
        W0: pretrained, of no use here.
        W1: fine-tuned.
        others: the same weight of other fine-tuned models.

    Example:
        >>> import torch
        >>> uniform_soup(torch.zeros(2), torch.tensor([1.0, 2.0]), others=[torch.tensor([3.0, 0.0])]).tolist()
        [2.0, 1.0]
    """
    return torch.stack([W1.to(torch.float64), *(W.to(W1.device, torch.float64) for W in others)]).mean(0).to(W1.dtype)


def _dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"Expected `{name}` to be a share, from 0 to 1, but got {value}.")
