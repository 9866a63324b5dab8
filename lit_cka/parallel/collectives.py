"""What ranks say to each other: the moments of all samples, from flat sums, and sizes that only some of them know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.functional.moments import PairedMoments, empty_moments, recentred_vectors


def flattened(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns a flat buffer with copies of the tensors, for one collective, and the copies as views of it."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    parts = flat.split([tensor.numel() for tensor in tensors])
    return flat, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def agree_on_sizes(sizes: Sequence[int], what: str, device: torch.device, group: Any) -> list[int]:
    """Returns the sizes that the ranks have; 0 on a rank means that it knows none yet.

    Raises:
        ValueError: on every rank, if two of them have different ones.
    """
    # In one collective: the largest, and, since 0 does not count, the negatives of the smallest.
    unknown = -torch.iinfo(torch.int64).max
    extremes = torch.tensor([*sizes, *(-size if size else unknown for size in sizes)], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes[: len(sizes)].tolist(), (-extremes[len(sizes) :]).tolist()
    if any(0 < large != small for large, small in zip(largest, smallest, strict=True)):
        raise ValueError(f"Expected the same {what} on all ranks, but got from {smallest} to {largest}.")
    return largest


def agree_on_exponents(exponents: Tensor, spreads: Tensor, group: Any) -> Tensor:
    """Returns `common_exponent` of all ranks, of each of these exponents of units, where `spreads` are not 0."""
    largest = exponents.masked_fill(spreads == 0, -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.masked_fill(largest.isinf(), 0.0)


def all_reduce_moments(moments: PairedMoments, group: Any = None) -> PairedMoments:
    """Returns the moments of the samples of all ranks, by summing what is measured from the mean of all.

    Every rank of the `group` takes part, also one without samples, whose widths may be 0. Takes the memory of one
    more set of moments, whatever the number of ranks, and what the collective itself needs.

    Raises:
        ValueError: if ranks have features of different widths.
    """
    d_x, d_y = agree_on_sizes(moments.xy.shape, "numbers of features", moments.n.device, group)
    if not moments.xy.numel():
        moments = empty_moments(d_x, d_y, moments.n.device)
    n = moments.n
    means = torch.cat([n * moments.mean_x, n * moments.mean_y, n[None]])
    dist.all_reduce(means, group=group)
    total = means[-1]
    mean_x, mean_y = (means[:-1] / total.clamp(min=1)).split([d_x, d_y])
    d, e = moments.mean_x - mean_x, moments.mean_y - mean_y
    flat, sums = flattened([moments.xx, moments.yy, moments.xy, *recentred_vectors(moments, d, e)])
    # As `recentre_moments` does, in place, to save the memory of another copy.
    for matrix, left, right in zip(sums, (d, e, d), (d, e, e), strict=False):
        matrix.addr_(n * left, right)
    dist.all_reduce(flat, group=group)
    return PairedMoments(total, mean_x, mean_y, *sums)
