"""Pooling of an output of which each process holds a part: what goes over the network is what pooling leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_cka.features.pooling import pool, sum_kept

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def pool_shards(output: DTensor, method: str, layout: str, mask: Tensor | None = None) -> Tensor:
    """Returns the features (n, d) of the whole output, on every process.

    Each process pools its part. Parts of the features are then gathered, and sums over parts of the positions are
    added up. "flatten" leaves all of an output, which is gathered before; so is one that is spread in another way than
    by `Shard`, `Replicate` and sums.

    Args:
        output: its axes as in `layout`. Every process of its mesh has to call this.
        method: as for `pool`.
        layout: one letter per axis, as for `pool`.
        mask: (n, positions) of all samples and positions; None if all count.
    """
    if method == "flatten" or not all(map(_is_simple, output.placements)):
        return pool(output.full_tensor(), method, layout, mask)
    axes = {letter: axis for axis, letter in enumerate(layout)}
    positions = [axis for letter, axis in axes.items() if letter not in "NC"]
    sharded = [placement.dim for placement in output.placements if placement.is_shard()]  # type: ignore[attr-defined]
    local = output.to_local()
    if any(placement.is_partial() for placement in output.placements):
        local = local.to(torch.float64)
    # Where an axis of the output is, of those of the features; of a position, nowhere: there are parts of sums.
    to = {axes["N"]: 0, axes["C"]: 1}
    if not set(sharded) & set(positions):
        kept = None if mask is None else _local(mask, output, {axes["N"]: 0})
        return _joined(pool(local, method, layout, kept), output, layout, to)
    shape = (output.shape[axes["N"]], *(output.shape[axis] for axis in positions))
    kept = _kept(shape, method, mask, local.device)
    mine = _local(kept, output, {axis: number for number, axis in enumerate([axes["N"], *positions])})
    tokens = local.permute(axes["N"], *positions, axes["C"]).flatten(1, -2)
    total = _joined(sum_kept(tokens, mine.flatten(1)), output, layout, to)
    return total / kept.flatten(1).sum(dim=1, keepdim=True)


def _is_simple(placement: Placement) -> bool:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return type(placement) in (Shard, Replicate) or (type(placement) is Partial and placement.reduce_op == "sum")


def _kept(shape: tuple[int, ...], method: str, mask: Tensor | None, device: torch.device) -> Tensor:
    """Returns which positions (n, *positions) a method takes the mean of."""
    n = shape[0]
    flat = torch.ones(shape, dtype=torch.bool, device=device).flatten(1)
    if mask is not None and method != "cls":
        flat = mask.to(device) != 0
    if method == "cls" or (method == "last" and flat.shape[1]):
        place = torch.arange(flat.shape[1], device=device)
        chosen = (flat.long() * (place + 1)).argmax(dim=1) if method == "last" else torch.zeros_like(place[:1])
        flat = flat & (place == chosen.expand(n)[:, None])
    return flat.reshape(shape)


def _local(values: Tensor, like: DTensor, axes: dict[int, int]) -> Tensor:
    """Returns this process's part of values that all have, whose axes are some of those of a DTensor: `axes` says which
    is which."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements: list[Placement] = [
        Shard(axes[placement.dim]) if type(placement) is Shard and placement.dim in axes else Replicate()
        for placement in like.placements
    ]
    return distribute_tensor(values, like.device_mesh, placements, src_data_rank=None).to_local()


def _joined(features: Tensor, like: DTensor, layout: str, to: dict[int, int]) -> Tensor:
    """Returns the features of all, of this process's: those of other samples or channels beside them, sums added up."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    shape = torch.Size([like.shape[layout.index("N")], like.shape[layout.index("C")]])
    placements = [
        (Shard(to[placement.dim]) if placement.dim in to else Partial()) if type(placement) is Shard else placement
        for placement in like.placements
    ]
    whole = DTensor.from_local(
        features.contiguous(), like.device_mesh, placements, shape=shape, stride=(shape[1], 1)
    ).full_tensor()
    return whole
