"""Inner products of Gram matrices when the samples of one side are permuted, for many permutations at once.

A measure that is an inner product `sum_ij K_ij L_ij` of two matrices of the samples (CKA, the correlation of RDMs) need
not be computed again for features whose samples are permuted by `p`: the rows and columns of `L` are, and the sizes
of both matrices stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_cka.functional.arrays import takes_arrays
from lit_cka.functional.precision import FullFloat32

_BLOCK_ELEMENTS = 2**19  # of the matrices that are permuted at once: what stays in the processor's cache


def draw_orders(n: int, num_permutations: int, seed: int) -> Tensor:
    """Returns random orders (num_permutations, n) of `n` samples; the same seed draws the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(num_permutations)])


@takes_arrays
def permuted_products(Ks: Tensor, Ls: Tensor, orders: Tensor) -> Tensor:
    """Returns the cosine of every matrix of `Ks` with every one of `Ls` whose samples are permuted.

        sum_ij K_ij L_p(i)p(j) / (||K||_F ||L||_F)

    Matrices are multiplied in float32 at unit norm and summed up in float64: 1e-7 of a cosine at worst, where the
    spread over permutations of `n` samples is about `1 / n`. One tile of `L` is moved at a time, of all matrices
    together.

    Args:
        Ks: symmetric matrices (a, n, n), float64, centred as the measure centres them.
        Ls: symmetric matrices (b, n, n).
        orders: permutations (t, n) of the samples.

    Returns:
        Float64 (t, a, b); NaN for matrices that are 0 or not finite.

    Example:
        >>> K = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
        >>> permuted_products(K, K, torch.tensor([[1, 0, 2], [2, 1, 0]])).flatten().round(decimals=6).tolist()
        [1.0, 0.0]
    """
    a, b, n = len(Ks), len(Ls), Ks.shape[-1]
    sizes_k, sizes_l = (matrices.flatten(1).norm(dim=1) for matrices in (Ks, Ls))
    defined = torch.outer(*((size > 0) & size.isfinite() for size in (sizes_k, sizes_l)))
    pairs = torch.empty(n * n, b, dtype=torch.float32, device=Ls.device)  # so that permuting moves whole rows
    for column, (L, size) in enumerate(zip(Ls, sizes_l, strict=True)):
        pairs[:, column] = _unit(L, size).flatten()
    products = Ks.new_zeros(len(orders), a, b)
    step = max(1, _BLOCK_ELEMENTS // (n * max(a, b)))
    with FullFloat32(Ks.device.type):
        for start in range(0, n, step):
            # Symmetric matrices: the upper triangle, counted twice, is enough.
            block = _unit(Ks[:, start : start + step, start:], sizes_k[:, None, None])
            block = (block.triu(1) + block.triu(0)).to(torch.float32).flatten(1)
            for product, order in zip(products, orders.to(Ks.device), strict=True):
                taken = (order[start : start + step, None] * n + order[start:]).flatten()
                product += block @ pairs.index_select(0, taken)
    return products.masked_fill(~defined, torch.nan)


def _unit(matrix: Tensor, size: Tensor) -> Tensor:
    """Returns a matrix of a norm of 1; zeros where it has none."""
    return (matrix / size).nan_to_num_(0.0, 0.0, 0.0)
