"""The update of one weight as a matrix, and its Gram matrix, in parts that take little memory.

`W0` and `W1` are (out, ...), read as matrices (out, rest); `Delta = W1 - W0`. With `rows` the Gram matrix is
`Delta Delta'`, and parts are columns of the update; else it is `Delta' Delta`, and parts are rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_cka.functional.lapack import lower_gram

_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**23  # elements of an update at a time
_BLOCK = 2**16  # elements of a chunk at a time, on a CPU
_NUM_BLOCKS = 6  # rows of blocks that a Gram matrix is computed in; a GPU computes all at once in less time


def check_shapes(W0: Tensor, W1: Tensor) -> None:
    """Raise a ValueError unless both are weights with an update that is a matrix."""
    if W0.shape != W1.shape or W1.ndim < 2 or W1.numel() == 0:
        raise ValueError(
            "Expected `W0` and `W1` to be weights of the same shape, of two or more dimensions, "
            f"but got {tuple(W0.shape)} and {tuple(W1.shape)}."
        )


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
    matrix, base = as_matrix(W1), as_matrix(W0)
    size = len(matrix) if rows else matrix.shape[1]
    num_blocks = _NUM_BLOCKS if W1.device.type == "cpu" else 1
    edges = [size * block // num_blocks for block in range(num_blocks + 1)]
    by_blas = products == torch.float32 and W1.device.type == "cpu"
    product = torch.zeros(size, size, dtype=products if by_blas else torch.float64, device=W1.device)
    gram = product  # of all parts, as soon as there is one
    spans = list(chunks(matrix, rows))
    memory = torch.empty(size * longest(spans), dtype=products, device=W1.device)
    norms = []
    for start, stop in spans:
        w0, w1 = (narrowed(W, start, stop, rows) for W in (base, matrix))
        delta = shaped(memory, *w1.shape)
        for block in blocks(delta):
            block0, block1 = w0[block].to(products), w1[block].to(products)
            norms.append(torch.linalg.vector_norm(block0, dtype=torch.float64))
            torch.sub(block1, block0, out=delta[block])
        columns = delta.T if rows else delta  # (chunk, size)
        if by_blas:
            lower_gram(columns, product)
            gram = gram.add_(product) if start else product.to(torch.float64)
            continue
        # By rows of blocks below the diagonal, which is all that `eigh` reads.
        for row in range(num_blocks):
            first, last = edges[row], edges[row + 1]
            target, left, right = gram[first:last, :last], columns[:, first:last].T, columns[:, :last]
            target.addmm_(left, right) if products == gram.dtype else target.add_(left @ right)
    return gram, torch.stack(norms).square().sum().item()


def chunks(matrix: Tensor, rows: bool) -> Iterator[tuple[int, int]]:
    """Yields where each part of the matrix starts and stops, all about as long; see `narrowed`."""
    along = 1 if rows else 0
    chunk = _CPU_CHUNK if matrix.device.type == "cpu" else _GPU_CHUNK
    length = matrix.shape[along]
    most = max(chunk // max(matrix.shape[1 - along], 1), 1)
    step = min(aligned(-(-length // -(-length // most))), most)
    for start in range(0, length, step):
        yield start, min(start + step, length)


def aligned(length: int) -> int:
    """Returns the next multiple of 16: rows of another length can make a product take half as long again."""
    return -(-length // 16) * 16


def longest(spans: Sequence[tuple[int, int]]) -> int:
    """Returns the length of the longest part."""
    return max(stop - start for start, stop in spans)


def narrowed(matrix: Tensor, start: int, stop: int, rows: bool) -> Tensor:
    """Returns a part of the matrix: of its columns with `rows`, else of its rows."""
    return matrix[:, start:stop] if rows else matrix[start:stop]


def blocks(part: Tensor) -> Iterator[slice]:
    """Yields rows of a part that a core of a CPU has in its cache from one operation to the next; elsewhere all."""
    step = max(_BLOCK // part.shape[1], 1) if part.device.type == "cpu" else len(part)
    for start in range(0, len(part), step):
        yield slice(start, start + step)


def shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Returns a matrix at the beginning of what was allocated once for several."""
    return memory[: rows * columns].view(rows, columns)
