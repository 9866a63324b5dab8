"""Modules of which each process holds a part: FSDP, FSDP2, tensor parallel, ZeRO-3; and the wrappers around modules.

What is private to torch or DeepSpeed stands here: checked with torch 2.15.0; DeepSpeed's ZeRO-3 by its documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lit_cka.features.lightning_private import attached_trainer
from lit_cka.features.sharded_outputs import is_dtensor

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Modules that wrappers put between another one and its name.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Returns the name that a module or tensor has without wrappers: of `torch.compile`, FSDP or checkpointing."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module within wrappers of the same kinds; itself where there are none."""
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((getattr(module, name) for name in _WRAPPED if name in module._modules), None)
    return module


def named_without_wrappers(module: nn.Module) -> dict[str, nn.Module]:
    """Returns a module and all within by their plain names, but for the wrappers."""
    return {plain_name(name): child for name, child in module.named_modules() if unwrapped(child) is child}


def _is_fsdp(module: nn.Module, *, flat: bool) -> bool:
    """Whether a module is FSDP's, without importing what takes long to import where there is none.

    Args:
        module: the module.
        flat: whether FSDP that flattens parameters is meant, or FSDP2.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel if flat else fsdp.FSDPModule)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before `fully_shard` gave it one of its own."""
    return type(module).__bases__[1] if _is_fsdp(module, flat=False) else type(module)


def is_of_sharding(hook: Callable[..., Any]) -> bool:
    """Returns whether a hook is what shards a module or gathers it, and not the user's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def is_sharded(module: nn.Module) -> bool:
    """Returns whether a module is spread over processes, which have to run it together."""
    modules = outermost(module).modules()
    return (
        any(_is_fsdp(child, flat=False) or _is_fsdp(child, flat=True) for child in modules)
        or any(map(is_dtensor, module.parameters()))
        or is_in_partitions(module)
    )


def is_in_partitions(module: nn.Module) -> bool:
    """Returns whether a module's parameters are ZeRO-3's, which are empty but while they are used."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def outermost(module: nn.Module) -> nn.Module:
    """Returns what FSDP has wrapped around a LightningModule; the module itself where there is no such thing."""
    is_in_lightning = hasattr(type(module), "configure_optimizers")
    trainer = attached_trainer(cast("pl.LightningModule", module)) if is_in_lightning else None
    around = None if trainer is None else trainer.strategy.model
    return around if around is not None and _is_fsdp(around, flat=True) else module


def free_gathered_weights(module: nn.Module) -> None:
    """Have every process hold its shards alone, as what FSDP gathers for a forward is kept after some.

    What is then written into the shards is what the next forward uses. Every process has to call it.
    """
    for child in outermost(module).modules():
        fsdp: Any = child
        if _is_fsdp(child, flat=False):
            fsdp.reshard()
        elif _is_fsdp(child, flat=True) and hasattr(fsdp._flat_param, "_local_shard"):  # since its first forward
            fsdp._handle.reshard(free_unsharded_flat_param=fsdp._handle.uses_sharded_strategy)


class FlatPart(NamedTuple):
    """A parameter that FSDP has flattened: its whole shape, and which of its numbers, flattened, are here."""

    shape: torch.Size
    start: int
    stop: int

    def of(self, whole: Tensor) -> Tensor:
        """Returns this process's part of a whole tensor."""
        return whole.reshape(-1)[self.start : self.stop]


def flat_parts(module: nn.Module) -> dict[int, FlatPart]:
    """Returns the parameters of a module that FSDP has flattened, by `id`; none for any other way of sharding."""
    return {id(parameter): part for parameter, part in _flat_parts(outermost(module))}


def _flat_parts(module: nn.Module) -> Iterator[tuple[nn.Parameter, FlatPart]]:
    for child in module.modules():
        flat = cast(Any, child)._flat_param if _is_fsdp(child, flat=True) else None
        if flat is None or flat._params is None:
            continue
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            part = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
            yield parameter, FlatPart(shape, *part)
