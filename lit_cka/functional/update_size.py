"""How far weights moved from one base, and whether they moved the same way; in parts that take little memory.

With `W0` the base and `Delta_i = W_i - W0` the update of each of several fine-tuned weights (task vectors, Ilharco et
al. 2023, arXiv 2212.04089), all of it follows from `||W0||_F` and the products `G_ij = <Delta_i, Delta_j>`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays

_CHUNK = 2**19  # elements at a time


class UpdateProducts(NamedTuple):
    """The squared norm of the base, and the products of all updates with each other; both can be added up.

    Example:
        >>> import torch
        >>> first, second = (UpdateProducts(4.0, torch.eye(2)) for _ in range(2))
        >>> UpdateProducts(first.base + second.base, first.products + second.products).products.tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    base: float  # ||W0||_F^2
    products: Tensor  # G (updates, updates), float64, on the CPU

    def relative_change(self, index: int = 0) -> float:
        """Returns `||Delta||_F / ||W0||_F` of one update: infinity for an update of zeros, 0 where nothing changed."""
        change = self.products[index, index].item()
        return math.sqrt(change / self.base) if self.base else (math.inf if change else change)

    def cosine(self, first: int = 0, second: int = 1) -> float:
        """Returns `<Delta_1, Delta_2> / (||Delta_1||_F ||Delta_2||_F)` in [-1, 1]; NaN where one of them is 0."""
        norms = self.products.diagonal().sqrt()
        cosine = (self.products[first, second] / norms[first] / norms[second]).item()
        return min(max(cosine, -1.0), 1.0) if cosine == cosine else cosine


@takes_arrays
def update_products(W0: Tensor, updated: Sequence[Tensor]) -> UpdateProducts:
    """Returns the products of the updates of one weight, summed in float64.

    Args:
        W0: the base, of any shape and floating dtype.
        updated: weights of that shape, of any floating dtypes.

    Returns:
        `||W0||_F^2` and `G_ij = <W_i - W0, W_j - W0>`. NaN or infinity in a weight makes its products so.

    Raises:
        ValueError: on other shapes or dtypes.

    Example:
        >>> W0, W1, W2 = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]), torch.tensor([4.0, 5.0])
        >>> found = update_products(W0, [W1, W2])
        >>> print(found.relative_change(0), round(found.cosine(), 4))
        0.2 0.7071
    """
    for W in updated:
        if W.shape != W0.shape or not (W.is_floating_point() and W0.is_floating_point()):
            raise ValueError(
                "Expected floating-point weights of the same shape, "
                f"but got {W0.dtype} {tuple(W0.shape)} and {W.dtype} {tuple(W.shape)}."
            )
    base = torch.zeros((), dtype=torch.float64, device=W0.device)
    products = torch.zeros(len(updated), len(updated), dtype=torch.float64, device=W0.device)
    for w0, *parts in zip(_parts(W0), *map(_parts, updated), strict=True):
        base += torch.dot(w0, w0)
        deltas = [part - w0 for part in parts]
        for i, delta in enumerate(deltas):
            for j, other in enumerate(deltas[: i + 1]):
                products[i, j] += torch.dot(delta, other)
    products = products.tril() + products.tril(-1).T
    return UpdateProducts(base.item(), products.cpu())


@takes_arrays
def num_not_finite(W: Tensor) -> int:
    """Returns how many elements of a weight are NaN or infinite.

    Example:
        >>> num_not_finite(torch.tensor([1.0, float("nan"), -float("inf")]))
        2
    """
    flat = W.detach().reshape(-1)
    return sum(int((~torch.isfinite(part)).sum().item()) for part in flat.split(_CHUNK))


def _parts(W: Tensor) -> Iterator[Tensor]:
    for part in W.detach().reshape(-1).split(_CHUNK):
        yield part.to(torch.float64)
