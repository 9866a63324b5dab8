"""What ranks say to each other: sums of tensors in one flat buffer, and sizes that only some of them know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_flat(tensors: Iterable[Tensor], shapes: Sequence[torch.Size], group: Any) -> list[Tensor]:
    """The tensors' sums over the ranks, in one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def agree_on_sizes(sizes: Sequence[int], what: str, device: torch.device, group: Any) -> list[int]:
    """The sizes that the ranks have; 0 on a rank means that it knows none yet.

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
