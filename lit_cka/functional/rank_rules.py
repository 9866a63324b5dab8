"""How many singular values make up the high part of an update, and whether rounding could change that number."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.update_spectrum import effective_rank

RankRule: TypeAlias = Literal["effective_rank", "freevariance", "vetterli", "energy", "variance"]
RULES: dict[str, str] = {
    "effective_rank": "effective_rank",
    "freevariance": "effective_rank",
    "vetterli": "effective_rank",
    "energy": "energy",
    "variance": "energy",
}
_TIE = 1e-9  # an effective rank this close above a whole number is that number: rounding put it there


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


def is_rank_doubtful(s: Tensor, errors: Tensor) -> bool:
    """Returns whether errors of the singular values could change the effective rank."""
    p, slack = s / s.sum(), errors / s.sum()
    # dH/dp_i = -log p_i + const; below, p log p grows at most as fast as at the slack itself.
    doubt = (slack * (1 - torch.log(torch.maximum(p, slack).clamp_min(1e-300)))).sum().item()
    low, high = effective_rank(s) * math.exp(-doubt), effective_rank(s) * math.exp(doubt)
    return math.ceil(low * (1 - _TIE)) != math.ceil(high * (1 - _TIE))


def is_energy_doubtful(s: Tensor, k: int, R: float, slack: float) -> bool:
    """Returns whether an error of the energy by `slack` could change where it reaches `R`."""
    energies = s.square().cumsum(0)
    before = float(energies[k - 2]) if k > 1 else -math.inf
    target = R * float(energies[-1])
    return before > target - slack or float(energies[k - 1]) < target + slack
