"""The update of one weight as a matrix, and its Gram matrix, in parts that take little memory.

`W0` and `W1` are (out, ...), read as matrices (out, rest); `Delta = W1 - W0`. With `rows` the Gram matrix is
`Delta Delta'`, and parts are columns of the update; else it is `Delta' Delta`, and parts are rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_cka.functional.lapack import add_gram

_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**23  # elements of an update at a time
_NUM_BLOCKS = 6  # rows of blocks that a Gram matrix is computed in; a GPU computes all at once in less time


def as_matrix(W: Tensor) -> Tensor:
    """Returns the weight as a matrix (out, rest), without its gradient."""
    return W.detach().reshape(len(W), -1)


def update(W0: Tensor, W1: Tensor) -> Tensor:
    """Returns the whole update as a float64 matrix."""
    return as_matrix(W1).to(torch.float64) - as_matrix(W0).to(torch.float64)


def gram_of_update(W0: Tensor, W1: Tensor, rows: bool, products: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Returns the Gram matrix of the update, its lower triangle, and `||W0||_F^2`, in float64.

    Products of a part are summed up in the dtype of `products`, and those of all parts in float64.
    """
    matrix = as_matrix(W1)
    size = len(matrix) if rows else matrix.shape[1]
    num_blocks = _NUM_BLOCKS if W1.device.type == "cpu" else 1
    edges = [size * block // num_blocks for block in range(num_blocks + 1)]
    gram = torch.zeros(size, size, dtype=torch.float64, device=W1.device)
    norm = torch.zeros((), dtype=torch.float64, device=W1.device)
    for start, stop in chunks(matrix, rows):
        w0, w1 = (narrowed(as_matrix(W), start, stop, rows) for W in (W0, W1))
        norm += torch.linalg.vector_norm(w0, dtype=torch.float64).square()
        delta = (w1.to(products) - w0.to(products)).contiguous()
        columns = delta.T if rows else delta  # (chunk, size)
        if products == torch.float32 and delta.device.type == "cpu":
            add_gram(columns, gram)
            continue
        # Block by block below the diagonal, which is all that `eigh` reads.
        for block in range(num_blocks):
            first, last = edges[block], edges[block + 1]
            target, left, right = gram[first:last, :last], columns[:, first:last].T, columns[:, :last]
            target.addmm_(left, right) if products == gram.dtype else target.add_(left @ right)
    return gram, norm.item()


def chunks(matrix: Tensor, rows: bool) -> Iterator[tuple[int, int]]:
    """Yields where each part of the matrix starts and stops; see `narrowed`."""
    along = 1 if rows else 0
    chunk = _CPU_CHUNK if matrix.device.type == "cpu" else _GPU_CHUNK
    step = max(chunk // max(matrix.shape[1 - along], 1), 1)
    for start in range(0, matrix.shape[along], step):
        yield start, min(start + step, matrix.shape[along])


def narrowed(matrix: Tensor, start: int, stop: int, rows: bool) -> Tensor:
    """Returns a part of the matrix: of its columns with `rows`, else of its rows."""
    return matrix[:, start:stop] if rows else matrix[start:stop]
