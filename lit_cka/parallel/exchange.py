"""What ranks exchange where one collective serves many small things, or a large thing takes several: `Group`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.parallel.collectives import agree_on_exponents, flattened

MAX_BYTES = 2**24  # of one collective, unless a single tensor has more
Piece = TypeVar("Piece")


class Group(NamedTuple):
    """This process among those that it works with: those of `handle`, all if that is None, or it alone."""

    rank: int
    size: int
    handle: Any = None

    @classmethod
    def of(cls, handle: Any = None) -> Group:
        if not dist.is_available() or not dist.is_initialized():
            return cls(0, 1)
        return cls(dist.get_rank(handle), dist.get_world_size(handle), handle)

    def gather_integers(self, mine: Sequence[Sequence[int]], device: torch.device) -> list[list[list[int]]]:
        """Returns what each rank has given, by rank: on all of them as many rows of as many integers."""
        if self.size == 1:
            return [[list(row) for row in mine]]
        integers = torch.tensor(mine, dtype=torch.int64, device=device)
        return [each.tolist() for each in self.gather(integers)]

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Returns what each rank has given, by rank: on all of them tensors of one shape and dtype."""
        if self.size == 1:
            return [mine]
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self.handle)
        return gathered

    def agree_on_exponents(self, exponents: Tensor, spreads: Tensor) -> Tensor:
        """Returns what all ranks agree on, see there."""
        return exponents if self.size == 1 else agree_on_exponents(exponents, spreads, self.handle)

    def add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums over all ranks of each of these tensors, of one dtype. The tensors may be changed."""
        if self.size == 1:
            return list(tensors)
        sums: list[Tensor] = []
        for some in in_buckets(tensors, [tensor.nbytes for tensor in tensors]):
            if len(some) == 1 and some[0].is_contiguous():
                flat, parts = some[0], some
            else:
                flat, parts = flattened(some)
            if flat.numel():
                dist.all_reduce(flat, group=self.handle)
            sums += parts
        return sums

    def exchange(
        self,
        pieces: Sequence[Sequence[Piece]],
        shapes: Callable[[Piece], Sequence[tuple[int, ...]]],
        read: Callable[[Piece], Iterable[Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Yields all pieces of all ranks in turn, with their tensors, on all ranks.

        Args:
            pieces: those of each rank, as all ranks know them.
            shapes: of the tensors of a piece.
            read: these tensors, of one of this rank's own pieces.
            dtype: of all tensors.
            device: where they are sent from, and come to.
        """
        for source, of_rank in enumerate(pieces):
            sizes = [sum(map(math.prod, shapes(piece))) for piece in of_rank]
            for some in in_buckets(list(zip(of_rank, sizes, strict=True)), [size * dtype.itemsize for size in sizes]):
                flat = torch.empty(sum(size for _, size in some), dtype=dtype, device=device)
                parts = flat.split([size for _, size in some])
                tensors = [_views(part, shapes(piece)) for (piece, _), part in zip(some, parts, strict=True)]
                if source == self.rank:
                    for (piece, _), targets in zip(some, tensors, strict=True):
                        for target, tensor in zip(targets, read(piece), strict=True):
                            target.copy_(tensor)
                dist.broadcast(flat, group=self.handle, group_src=source)
                yield from zip([piece for piece, _ in some], tensors, strict=True)


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def in_buckets(items: Sequence[Piece], sizes: Sequence[int], limit: int = MAX_BYTES) -> Iterator[list[Piece]]:
    """Yields the items in turn, as many at a time as have no more than `limit` together, but at least one."""
    bucket: list[Piece] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if bucket and filled + size > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket
