"""Parameters that are flattened before they are shared out, by FSDP or by DeepSpeed's ZeRO-3: `FlatPart`.

What is private to torch or DeepSpeed stands here: checked with torch 2.15.0 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel


class FlatPart(NamedTuple):
    """A parameter that was flattened: its whole shape, and which of its numbers are here.

    Attributes:
        shape: of the whole parameter.
        start: the first of its numbers, flattened, that is here.
        held: these numbers (m,); to write into it is to write into the module.
    """

    shape: torch.Size
    start: int
    held: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """Returns this process's part of a whole tensor."""
        return whole.reshape(-1)[self.start : self.start + len(self.held)]


def is_flat_fsdp(module: nn.Module) -> TypeGuard[FullyShardedDataParallel]:
    """Returns whether a module is FSDP's that flattens, without importing what takes long to import where none is."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_in_partitions(module: nn.Module) -> bool:
    """Returns whether a module's parameters are ZeRO-3's, which are empty but while they are used."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def flat_parts(module: nn.Module) -> dict[int, FlatPart]:
    """Returns the parameters within a module that were flattened, by `id`; none for any other way of sharding."""
    fsdp = {id(parameter): part for parameter, part in _parts_of_fsdp(module)}
    return {**fsdp, **{id(parameter): part for parameter, part in _partitions(module)}}


def _parts_of_fsdp(module: nn.Module) -> Iterator[tuple[nn.Parameter, FlatPart]]:
    for child in filter(is_flat_fsdp, module.modules()):
        flat: Any = child._flat_param
        if flat is None or flat._params is None:
            continue
        shard = getattr(flat, "_local_shard", flat.data)  # it has one from its first forward on
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            if info.in_shard:
                held = shard.detach()[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
                yield parameter, FlatPart(shape, info.intra_param_start_idx, held)
            else:
                yield parameter, FlatPart(shape, 0, shard.detach()[:0])


def _partitions(module: nn.Module) -> Iterator[tuple[nn.Parameter, FlatPart]]:
    for parameter in module.parameters():
        ds: Any = parameter
        if getattr(ds, "ds_tensor", None) is None:
            continue
        start = min(dist.get_rank(ds.ds_process_group) * ds.ds_tensor.ds_numel, ds.ds_numel)
        held = ds.ds_tensor.detach()[: max(min(ds.ds_numel - start, ds.ds_tensor.ds_numel), 0)]
        yield parameter, FlatPart(torch.Size(ds.ds_shape), start, held)


def shape_of(parameter: Tensor, parts: dict[int, FlatPart]) -> torch.Size:
    """Returns the shape of a whole parameter.

    Args:
        parameter: of a module.
        parts: the `flat_parts` of the module.
    """
    part = parts.get(id(parameter))
    return parameter.shape if part is None else part.shape


def free_gathered(module: nn.Module, engine: Any = None) -> None:
    """Have every process hold its part of flattened parameters alone; each has to call it.

    Args:
        module: FSDP's modules are looked for within it.
        engine: DeepSpeed's, if the module is in one.
    """
    for child in filter(is_flat_fsdp, module.modules()):
        fsdp: Any = child
        if fsdp._handle is not None and hasattr(fsdp._flat_param, "_local_shard"):  # since its first forward
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(fsdp, fsdp._handle, fsdp._handle.uses_sharded_strategy)
    if is_in_partitions(module) and engine is not None:
        # It waits for what is on its way, and frees small parameters too, which are otherwise kept whole.
        engine.optimizer.empty_partition_cache()


def why_parts_are_closed(module: nn.Module) -> str | None:
    """Returns why the flattened parameters of a module can't be read and written part by part; None if they can."""
    for parameter in module.parameters():
        ds: Any = parameter
        partition = getattr(ds, "ds_tensor", None)
        if partition is None:
            continue
        if getattr(ds, "ds_secondary_tensor", None) is not None:
            return "DeepSpeed keeps a second partition of each weight (hpZ)"
        if hasattr(ds, "comm"):
            return "DeepSpeed shares its weights out within groups of processes (MiCS)"
        if hasattr(partition, "ds_quant_scale"):
            return "DeepSpeed keeps its weights quantised"
        if str(getattr(partition, "final_location", None)).endswith("nvme"):
            return "DeepSpeed keeps its weights on an NVMe disk"
    return None


def has_nameless_parameters(module: nn.Module) -> bool:
    """Returns whether FSDP has put parameters in place that have lost their names (`use_orig_params=False`)."""
    return any(
        child._flat_param is not None and child._flat_param._params is None
        for child in module.modules()
        if is_flat_fsdp(child)
    )
