"""Which samples of a pass count where several ranks, or several batches, hold the same: each once."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_MOST_AT_ONCE = 2**18  # samples of all ranks, in one exchange
OPEN, COUNTS, NOT = 2, 1, 0


class DataRanks(NamedTuple):
    """The processes that hold different samples: not those that share a model of several parts.

    Attributes:
        rank: this process's number among them.
        size: how many they are.
        group: their process group; None for all processes. Sums over the samples are to be taken over it.
        device: for what they send each other.
        replicas: the processes that hold the same samples as this one, of which each runs a part of the model; None
            where there is no other.
    """

    rank: int
    size: int
    group: Any
    device: torch.device
    replicas: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that hold the same samples."""
        return self.replicas is None or not any(self.replicas.get_coordinate() or ())


def data_ranks(
    trainer: pl.Trainer, rank: int | None = None, world_size: int | None = None, group: Any = None
) -> DataRanks:
    """The processes of a training that hold different samples, from its strategy, or as given."""
    strategy = trainer.strategy
    device = strategy.root_device
    if rank is not None and world_size is not None:
        return DataRanks(rank, world_size, group, device)
    if not (dist.is_available() and dist.is_initialized()):
        return DataRanks(0, 1, None, device)
    try:
        mesh: Any = strategy.device_mesh  # type: ignore[attr-defined]
        data = mesh["data_parallel"]
        others = tuple(name for name in mesh.mesh_dim_names if name != "data_parallel")
    except (AttributeError, RuntimeError, KeyError, TypeError):  # no mesh, or none with this dimension
        return DataRanks(dist.get_rank(), dist.get_world_size(), None, device)
    replicas = mesh[others] if data.size() < mesh.size() else None
    return DataRanks(data.get_local_rank(), data.size(), data.get_group(), device, replicas)


class Occurrences:
    """How often each key has been seen before."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[int, ...]] = Counter()

    def of(self, keys: Tensor) -> Tensor:
        """For each row of the keys (n, 2), how many rows before it, in all calls, have the same key."""
        numbers = []
        for key in map(tuple, keys.tolist()):
            numbers.append(self._seen[key])
            self._seen[key] += 1
        return torch.tensor(numbers, dtype=torch.int64, device=keys.device)


def any_rank(value: bool, ranks: DataRanks) -> bool:
    """Whether it is so on some rank. Every rank has to call it."""
    if ranks.size == 1:
        return value
    found = torch.tensor(int(value), device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=ranks.group)
    return bool(found)


def settle(keys: Tensor, occurrences: Tensor, states: Tensor, ranks: DataRanks) -> Tensor:
    """Which samples count, when all ranks tell each other what they have. Every rank has to call it.

    Samples are the same if they have the same key and the same number among those of this key on their rank. Each
    counts once: where it is said to count, else on the lowest rank that has it.

    Args:
        keys: (n, 2), of this rank's samples.
        occurrences: (n,), the number of each among those of its key.
        states: (n,), of `COUNTS`, `NOT` and `OPEN`, for those that are to be settled.
        ranks: the processes that hold different samples.

    Returns:
        A mask (n,). What each rank takes at once from all others is bounded, whatever the number of samples.
    """
    counted = states == COUNTS
    rows = torch.cat([keys, occurrences[:, None], states[:, None]], dim=1)[states != NOT]
    mine = {tuple(row[:3]): place for place, row in enumerate(rows.tolist()) if row[3] == OPEN}
    lost: set[int] = set()
    for rank, others in _exchanged(rows, ranks):
        for *sample, state in others:
            place = mine.get(tuple(sample))
            if place is not None and (state == COUNTS or rank < ranks.rank):
                lost.add(place)
    is_open = torch.nonzero(states != NOT).flatten()
    won = [place for place in mine.values() if place not in lost]
    counted[is_open[won]] = True
    return counted


def _exchanged(rows: Tensor, ranks: DataRanks) -> Any:
    """The rows of the other ranks, some at a time: pairs of a rank and a list of rows."""
    if ranks.size == 1:
        return
    longest = torch.tensor(len(rows), device=ranks.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=ranks.group)
    size = max(_MOST_AT_ONCE // ranks.size, 1)
    for start in range(0, int(longest), size):
        part = torch.full((min(size, int(longest) - start), rows.shape[1]), -1, device=ranks.device)
        own = rows[start : start + len(part)]
        part[: len(own)] = own.to(ranks.device)
        parts = [torch.empty_like(part) for _ in range(ranks.size)]
        dist.all_gather(parts, part, group=ranks.group)
        for rank, other in enumerate(parts):
            if rank != ranks.rank:
                yield rank, other[other[:, 3] >= 0].tolist()  # without what fills up
