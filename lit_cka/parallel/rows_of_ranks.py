"""Rows that one rank needs and another one has: `look_up_on_all_ranks`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lit_cka.parallel.exchange import Group

_CHUNK_BYTES = 2**24  # what the ranks hold at once of rows that are not theirs


def look_up_on_all_ranks(
    keys: Tensor, rows_of: Callable[[Tensor], tuple[Tensor, Tensor]], width: int, device: torch.device, group: Group
) -> tuple[Tensor, Tensor]:
    """Return which rows any rank has, (n,) of bool, and those rows, (found, width) of float64, in the order of `keys`.

    Every rank of the group has to call it, with any number of keys. Two small collectives where no rank has any.

    Args:
        keys: (n, k) of int64, the rows that this rank needs.
        rows_of: given keys (m, k), returns what this rank has: (m,) of bool, and rows (m, width) of float64, of which
            those that it has not are ignored. It is called with the keys of other ranks.
        width: of the rows; 0 where this rank has none.
        device: for the collectives.
        group: the processes that ask each other.
    """
    sizes = torch.zeros(group.size + 1, dtype=torch.int64, device=device)
    sizes[group.rank], sizes[-1] = len(keys), width
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group.handle)
    *counts, width = sizes.tolist()
    found, rows = torch.zeros(len(keys), dtype=torch.bool), torch.empty(len(keys), width, dtype=torch.float64)
    at_once = max(_CHUNK_BYTES // (8 * max(width, 1)), 1)
    for asker, count in enumerate(counts):
        for start in range(0, count, at_once):
            num = min(at_once, count - start)
            asked = torch.empty(num, keys.shape[1], dtype=torch.int64, device=device)
            if asker == group.rank:
                asked.copy_(keys[start : start + num])
            dist.broadcast(asked, group=group.handle, group_src=asker)
            answer = _answer(asked, rows_of, width, device, group)
            if asker == group.rank:
                found[start : start + num] = answer[0].cpu()
                rows[start : start + num] = answer[1].cpu()
    return found, rows[found]


def _answer(
    asked: Tensor, rows_of: Callable[[Tensor], tuple[Tensor, Tensor]], width: int, device: torch.device, group: Group
) -> tuple[Tensor, Tensor]:
    """Return which of the rows some rank has, and those rows; of several ranks the first one's."""
    has, rows = rows_of(asked.cpu())
    ranks = torch.where(has.to(device), group.rank, group.size)
    dist.all_reduce(ranks, dist.ReduceOp.MIN, group=group.handle)
    mine = ranks == group.rank
    answer = torch.zeros(len(asked), width, dtype=torch.float64, device=device)
    if bool(mine.any()):
        answer[mine] = rows.to(device)[mine]
    dist.all_reduce(answer, group=group.handle)
    return ranks < group.size, answer
