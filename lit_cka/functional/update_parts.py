"""The two parts of an update, weighted anew: `write_weighted`.

A weight is gone through in chunks for the products, and each chunk in blocks that stay in a core's cache while all of
its sums are written. What is needed on the way is allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_cka.functional.precision import FullFloat32
from lit_cka.functional.update_gram import aligned, as_matrix, blocks, chunks, longest, narrowed, shaped


def write_weighted(
    targets: Sequence[Tensor],
    W0: Tensor,
    W1: Tensor,
    basis: Tensor,
    weights: Sequence[tuple[float, float]],
    *,
    rows: bool,
) -> None:
    """Write `W0 + outside (Delta - P Delta) + inside P Delta` into a target for each `(outside, inside)`.

    Args:
        targets: of the shape of `W1`, contiguous, of any dtype; the last may be `W1` itself.
        W0: pretrained weight, (out, ...), read as a matrix (out, rest).
        W1: fine-tuned weight of the same shape.
        basis: (m, j), orthonormal, of what `P` projects on; in the dtype to compute in.
        weights: of the two parts, for each target.
        rows: whether `P` is to be applied to the rows' space, so that m is out; else to the columns'.
    """
    flat, starts, ends = [as_matrix(target) for target in targets], as_matrix(W0), as_matrix(W1)
    spans, (size, rank) = list(chunks(ends, rows)), basis.shape
    length, width = longest(spans), aligned(rank)
    memory, inner, w0_memory, w1_memory = (
        torch.empty(number * length, dtype=basis.dtype, device=basis.device)
        for number in (size, width, _needed(starts, basis), _needed(ends, basis))
    )
    for start, stop in spans:
        w0, w1 = narrowed(starts, start, stop, rows), narrowed(ends, start, stop, rows)
        if len(w0_memory):
            w0 = shaped(w0_memory, *w0.shape).copy_(w0)
        if len(w1_memory):
            w1 = shaped(w1_memory, *w1.shape).copy_(w1)
        # Contiguous, so that the products are the same bits however the weights lie in memory.
        delta = torch.sub(w1, w0, out=shaped(memory, *w1.shape))
        with FullFloat32(basis.device.type):
            if rows:
                coordinates = torch.mm(basis.T, delta, out=shaped(inner, rank, stop - start))
                part = torch.mm(basis, coordinates, out=delta)
            else:
                coordinates = torch.mm(delta, basis, out=shaped(inner, stop - start, width)[:, :rank])
                part = torch.mm(coordinates, basis.T, out=delta)
        into = [narrowed(target, start, stop, rows) for target in flat]
        for block in blocks(part):
            for target, (outside, inside) in zip(into, weights, strict=True):
                base = w0[block] if outside == 0 else w1[block]
                if outside not in (0, 1):
                    base = torch.lerp(w0[block], base, outside)
                torch.add(base, part[block], alpha=inside - outside, out=target[block])


def _needed(matrix: Tensor, basis: Tensor) -> int:
    """Returns how many numbers of a matrix to hold for each of a chunk's columns or rows: none if it does as it is."""
    return 0 if matrix.dtype == basis.dtype and matrix.is_contiguous() else len(basis)
