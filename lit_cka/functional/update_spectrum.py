"""The singular values of the update of one weight, and how many directions they amount to.

With `W0` the base and `W1` the fine-tuned weight, each read as a matrix (out, rest), `Delta = W1 - W0` has the singular
values `s_1 >= ... >= s_m`, `m = min(out, rest)`: the roots of the eigenvalues of its smaller Gram matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.update_gram import check_shapes, gram_of_update


@takes_arrays
def effective_rank(singular_values: Tensor) -> float:
    """Returns how many singular values would say as much if all were equal (Roy & Vetterli 2007, eq. 4).

        exp(H), H = -sum p_i log p_i, p_i = s_i / sum s

    Args:
        singular_values: (m,).

    Returns:
        From 1 to m; NaN where all are 0.

    Example:
        >>> print(round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6))
        2.0
    """
    s = singular_values.detach().to(torch.float64)
    return math.exp(torch.special.entr(s / s.sum()).sum().item())


@takes_arrays
def stable_rank(singular_values: Tensor) -> float:
    """Returns `||Delta||_F^2 / ||Delta||_2^2 = sum s_i^2 / s_1^2` (Rudelson & Vershynin 2007), which small singular
    values hardly add to.

    Args:
        singular_values: (m,), in any order.

    Returns:
        From 1 to m; NaN where all are 0.

    Example:
        >>> print(stable_rank(torch.tensor([2.0, 1.0])))
        1.25
    """
    s = singular_values.detach().to(torch.float64)
    return (s / s.max()).square().sum().item()


@takes_arrays
def update_singular_values(W0: Tensor, W1: Tensor) -> Tensor:
    """Returns the singular values of an update.

    Takes, besides the weights, twice the smaller Gram matrix: `16 m^2` bytes.

    Args:
        W0: base weight of two or more dimensions, (out, ...); read as a matrix (out, rest).
        W1: fine-tuned weight of the same shape; both floating point and finite.

    Returns:
        (m,), float64, descending. What is below `s_1 sqrt(m eps)`, about `1e-6 s_1`, can't be told from 0 in a Gram
        matrix, and is 0.

    Raises:
        ValueError: on other shapes.

    Example:
        >>> W0, W1 = torch.ones(2, 3), torch.tensor([[4.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
        >>> update_singular_values(W0, W1).tolist()
        [3.0, 1.0]
    """
    check_shapes(W0, W1)
    return singular_values_from_gram(gram_of_update(W0, W1, rows_are_fewer(W1))[0])


def rows_are_fewer(W: Tensor) -> bool:
    """Returns whether the Gram matrix over the rows, as a matrix (out, rest), is the smaller one."""
    return len(W) <= W[0].numel()


def singular_values_from_gram(gram: Tensor) -> Tensor:
    """Returns the singular values (m,), descending, from the lower triangle of a Gram matrix (m, m) in float64."""
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(gram) * torch.finfo(torch.float64).eps * eigenvalues[0]
    return torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt()
